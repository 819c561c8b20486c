"""The difference between training times on a subset of the samples and on all samples."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
import math

import numpy as np
import torch

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._adam_configurations import AdamConfigurations
from optuna_ttp.dynamics._growth import KernelGrowth
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
from optuna_ttp.dynamics._simulation import simulate
from optuna_ttp.dynamics._target import Target


@dataclass(frozen=True)
class SubsetRules:
    """The simulation of random subsets of the samples.

    They widen the intervals of spectra of a subset, and say how many samples are enough. Half and
    twice of each change no search of ``benchmarks/search/results/ablation.md``.
    """

    n_draws: int = 4
    """Number of random subsets of each size; the mean of their logarithmic times is taken:
    four, because each costs a simulation at first use."""
    change: float = 0.5
    """Relative change of the steepest direction in one full-batch step of the simulation."""
    converged: float = 0.1
    """Difference of logarithmic times up to which they count as converged: the recommended number
    of samples gives times within 10 %. A choice, not a measurement; no search reads it."""


RULES = SubsetRules()


@dataclass(frozen=True, eq=False)
class SampleConvergence:
    """The predicted training time as a function of the number of samples."""

    n_samples: Integers
    """Subset sizes, ascending to the number of samples of the spectrum, shape ``(J,)``."""
    log_times: Floats
    """Logarithm of the intrinsic time ``eta_e T`` to the target, shape ``(J,)``, the mean over
    random subsets; infinite if a subset does not reach it."""
    log_spread: Floats
    """Standard deviation of that logarithm over the subsets, ``(J,)``; infinite likewise."""
    rules: SubsetRules = RULES

    @classmethod
    def measure(
        cls,
        model: LinearisedModel,
        target: Target,
        *,
        configurations: SGDConfigurations | AdamConfigurations | None = None,
        growth: KernelGrowth | None = None,
        max_steps: int = 100_000,
        seed: int = 0,
        rules: SubsetRules = RULES,
    ) -> SampleConvergence:
        """Simulate full-batch training on an eighth, a quarter, a half and all of the samples.

        The subsets of the model's samples are random. A target loss is converted to the same
        fraction of each subset's initial loss. One slow configuration is trained; by default it is
        one of plain gradient descent.
        """
        n = model.n_samples
        subset_sizes = sorted({max(1, n // 8), max(1, n // 4), max(1, n // 2), n})
        if target.quantity == "smoothed_loss":
            target = replace(target, quantity="loss")
        whole = float(model.loss(model.initial_outputs[None]))
        generator = torch.Generator().manual_seed(seed)
        if configurations is None:
            rate = rules.change / max(float(model.curvatures[0]), 1e-30)
            configurations = SGDConfigurations.of(rate)
        rate = float(configurations.learning_rate[0])
        means, spreads = [], []
        for n_chosen in subset_sizes:
            times = []
            for _ in range(1 if n_chosen == n else rules.n_draws):
                part = model.restricted(torch.randperm(n, generator=generator)[:n_chosen])
                goal = target
                if target.quantity == "loss" and not target.settled:
                    initial = float(part.loss(part.initial_outputs[None]))
                    goal = replace(target, value=target.value * initial / whole)
                curves = simulate(
                    part,
                    configurations,
                    np.array([n_chosen]),
                    max_steps=np.array([max_steps]),
                    target=goal,
                    growth=growth,
                )
                times.append(math.log(rate * max(1.0, curves.first_passage_times(goal)[0])))
            means.append(np.mean(times))
            spreads.append(np.std(times) if np.isfinite(times).all() else math.inf)
        return cls(np.array(subset_sizes), np.array(means), np.array(spreads), rules)

    def error(self, n_samples: int) -> float:
        """Return the standard deviation of the logarithm of the time on ``n_samples`` samples.

        It comes from knowing the time on the spectrum's samples only; zero if there are no more.
        It has two parts: the standard deviation between random halves of the spectrum's samples,
        over ``sqrt(2)``, which shrinks with more samples; and the drift, the root mean square
        change of the logarithm in the last two doublings, once for every further doubling. A
        drift that halves with every doubling, as in a power law, was overconfident: two thirds
        of the intervals from a fifth to a half of 120 samples did not hold the real time.

        Extrapolating the drift (Aitken) and correcting the time by it made predictions worse on
        a residual network, 34 % off instead of 16 % for the mean squared error and 32 % instead
        of 22 % for the cross-entropy (250 of 2,000 samples, to 25 % of the initial loss;
        benchmarks/accuracy/subset.py). So the time itself is not corrected.
        """
        return self._error(int(self.n_samples[-1]), n_samples)

    def recommended(self, n_samples: int) -> int:
        """Return the number of samples that suffices for a time within 10 % of that on all N.

        It is the smallest subset size whose time differs by less from the spectrum's, with its
        spread and :meth:`error` included. If there is none, the number of samples of the spectrum
        is doubled until the error would be at most 10 %. The result is at most ``N = n_samples``.
        """
        converged = self.rules.converged
        for k, n_chosen in enumerate(self.n_samples[:-1]):
            if not math.isfinite(self.log_times[k]):
                continue
            away = self.log_times[-1] - self.log_times[k]
            if math.hypot(away, self.log_spread[k], self.error(n_samples)) <= converged:
                return min(int(n_chosen), n_samples)
        n_enough = int(self.n_samples[-1])
        while n_enough < n_samples and self._error(n_enough, n_samples) > converged:
            n_enough *= 2
        return min(n_enough, n_samples)

    def _error(self, n_chosen: int, n_samples: int) -> float:
        """Return :meth:`error` if the time were known on ``n_chosen`` samples."""
        if n_samples <= n_chosen:
            return 0.0
        doublings = math.log2(n_samples / n_chosen)
        if len(self.n_samples) < 3 or not np.isfinite(self.log_times[-2:]).all():
            return 0.5 * doublings
        steps = np.diff(self.log_times[np.isfinite(self.log_times)])[-2:]
        drift = float(np.sqrt(np.square(steps).mean())) * doublings
        of_half = float(self.n_samples[-1]) / n_chosen * float(self.log_spread[-2]) ** 2
        return math.hypot(drift, math.sqrt(0.5 * of_half * (1.0 - n_chosen / n_samples)))
