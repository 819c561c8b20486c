"""The way of one task's linearised network to one target."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math
from typing import Any

import numpy as np

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Target
from optuna_ttp.prediction._simulator import Simulator


# A difference of a step is a difference of three percent.
_FEW_STEPS = 32
# What the response surface is built from; it ranks candidates, it does not promise times.
_SURFACE_TRACE = 0.95


@dataclass(frozen=True, eq=False)
class TargetPath:
    """What is derived once of a task, its settings and its target.

    Attributes:
        simulator:
            Task and settings.
        target:
            What to reach.
        max_steps:
            The horizon.
    """

    simulator: Simulator
    target: Target
    max_steps: int

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "surface"}

    @cached_property
    def depth(self) -> float:
        """Training loss over the initial one where the target is, on the linearised path.

        The lowest loss that is possible, with label smoothing, counts as zero. Of a target that
        depends on the end of the curve it is not known: NaN.
        """
        floor, initial = self.simulator.model.loss_floor, self.simulator.initial_loss
        if self.target.settled:
            return math.nan
        if self.target.quantity in ("loss", "smoothed_loss"):
            return (self.target.value - floor) / (initial - floor)
        rate = np.array([self.simulator.slow_rate])
        size = np.array([self.simulator.spectrum.n_samples])
        curves = simulate(
            self.simulator.model,
            SGDConfigurations.of(rate),
            size,
            max_steps=np.array([5_000]),
            target=self.target,
        )
        return (float(np.nanmin(curves.curves["loss"])) - floor) / (initial - floor)

    @cached_property
    def fraction(self) -> float:
        """Training loss over the initial one at the depth, as the probe counts it."""
        floor, initial = self.simulator.model.loss_floor, self.simulator.initial_loss
        return (self.depth * (initial - floor) + floor) / initial

    @property
    def has_surface(self) -> bool:
        """Whether times are a function of learning rate, batch size and momentum alone."""
        settled = self.target.settled
        return bool(
            self.simulator.schedule.is_constant
            and not settled
            and self.simulator.settings.method == "linear"
        )

    @cached_property
    def surface(self) -> ResponseSurface:
        """Times as simulated, for many configurations at once."""
        share = min(_SURFACE_TRACE, self.simulator.spectrum.explained_trace)
        model = LinearisedModel.from_spectrum(
            self.simulator.spectrum.truncate(explained_trace=share),
            device=self.simulator.settings.device,
        )
        return ResponseSurface.build(
            model,
            self.target,
            DEPTHS,
            max_steps=self.max_steps,
            optimizer=self.simulator.optimizer,
            sampling=self.simulator.settings.sampling,
            smoothing=self.simulator.settings.smoothing,
            growth=self.simulator.kernel_growth,
            limit=self.simulator.own_stability_limit,
            seed=self.simulator.settings.seed,
        )

    @cached_property
    def sample_convergence(self) -> SampleConvergence:
        """How times depend on the number of samples of the spectrum."""
        return SampleConvergence.measure(
            self.simulator.model,
            self.target,
            growth=self.simulator.kernel_growth,
            seed=self.simulator.settings.seed,
        )

    @cached_property
    def subset_sd(self) -> float:
        """What the other samples may change of the logarithm of a time."""
        if self.simulator.n_samples == self.simulator.spectrum.n_samples:
            return 0.0
        if self.target.settled:
            # Both ends of the curve move, mostly together.
            return 0.2
        return self.sample_convergence.error(self.simulator.n_samples)

    @cached_property
    def truncation_log_error(self) -> float:
        """What the dropped eigenpairs change, from what dropping as much again changes."""
        kept = self.simulator.spectrum.explained_trace
        if kept > 1.0 - 1e-6 or self.target.settled:
            return 0.0
        spectrum = self.simulator.spectrum
        shorter = spectrum.truncate(explained_trace=max(1.0 - 2.0 * (1.0 - kept), 0.01))
        if shorter.rank == spectrum.rank and spectrum.rank > 1:
            # Equal eigenvalues are kept together.
            shorter = spectrum.truncate(rank=spectrum.rank - 1)
        model = LinearisedModel.from_spectrum(shorter)
        target = self.target
        if target.quantity == "smoothed_loss":
            target = replace(target, quantity="loss")
        rate = float(self.simulator.slow_rate)
        models = (self.simulator.model, model)
        times = [_slow_first_passage_time(m, rate, target) for m in models]
        if min(times) < _FEW_STEPS:
            # Whole steps tell nothing where there are few of them.
            times = [_slow_first_passage_time(m, rate / _FEW_STEPS, target) for m in models]
        if not np.isfinite(times).all():
            return 1.0
        return abs(math.log(max(times[1], 1.0) / max(times[0], 1.0)))

    @cached_property
    def best_depth(self) -> float:
        """Depth at which the validation loss is predicted to be lowest.

        That of slow full-batch training of the linearised network; infinite without validation
        data, or where more training always helps within 20,000 steps.
        """
        if self.simulator.model.validation is None:
            return math.inf
        rate = np.array([self.simulator.slow_rate])
        run = simulate(
            self.simulator.model,
            SGDConfigurations.of(rate),
            np.array([self.simulator.model.n_samples]),
            max_steps=np.array([20_000]),
            target=Target("validation_loss", 1e-12),
            full_curves=True,
        )
        losses = run.curves["validation_loss"][0]
        known = np.flatnonzero(np.isfinite(losses) & np.isfinite(run.steps[0]))
        best = known[int(np.argmin(losses[known]))]
        if best == known[-1]:
            return math.inf
        return math.log(
            self.simulator.initial_loss / max(float(run.curves["loss"][0, best]), 1e-300)
        )


def _slow_first_passage_time(model: LinearisedModel, rate: float, target: Target) -> float:
    """Steps of full batches to a target."""
    run = simulate(
        model,
        SGDConfigurations.of(np.array([rate])),
        np.array([model.n_samples]),
        max_steps=np.array([5_000]),
        target=target,
    )
    return float(run.first_passage_times(target)[0])
