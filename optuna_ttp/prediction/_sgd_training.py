"""Training by SGD, as far as predictions are concerned."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Saturation
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import SGDSurface
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import StabilityLimit
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction._rules import RULES
from optuna_ttp.prediction._settings import PredictorSettings
from optuna_ttp.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class SGDTraining:
    """Training by SGD: on the eigenpairs or, with parameter groups, on the columns.

    ``eigen`` is the model of the eigenpairs, which has the curvatures; ``n_samples`` the number of
    samples that are trained on.
    """

    spectrum: Spectrum
    eigen: LinearisedModel
    optimizer: SGD
    n_samples: int
    settings: PredictorSettings

    @cached_property
    def model(self) -> LinearisedModel:
        """The model that is simulated."""
        if self.optimizer.groups is None:
            return self.eigen
        return LinearisedModel.from_columns(self.spectrum, device=self.settings.device)

    @property
    def growth_exponent(self) -> float:
        """One: the speed is proportional to the kernel."""
        return 1.0

    @property
    def hopeless_stability(self) -> float:
        """The learning rate over the largest stable one above which training always fails."""
        return RULES.hopeless_stability

    @cached_property
    def stability_limit(self) -> StabilityLimit:
        """The limit of stable learning rates at the pretrained weights, for all samples."""
        return StabilityLimit.of(self.eigen, self.n_samples)

    @property
    def growth_limit(self) -> StabilityLimit:
        """The stability limit if mini-batches were drawn from the samples of the spectrum only."""
        return replace(self.stability_limit, n_samples=self.spectrum.n_samples)

    @cached_property
    def saturation(self) -> Saturation | None:
        """How much large steps are slowed; None if that was not measured, or is not wanted."""
        measured = self.spectrum.saturation
        if measured is None or not self.settings.saturation:
            return None
        return Saturation.from_measurement(
            measured.sgd_batch_sizes,
            measured.sgd_rates,
            measured.sgd_ratios,
            of_sgd=True,
        )

    def max_learning_rate(self, batch_size: Integers | Floats, momentum: Floats) -> Floats:
        """Return the largest stable learning rates of K configurations, shape ``(K,)``."""
        return self.stability_limit.max_learning_rate(
            batch_size,
            momentum,
            dampening=self.optimizer.dampening,
            nesterov=self.optimizer.nesterov,
            weight_decay=self.optimizer.weight_decay,
            replacement=self.settings.sampling == "replacement",
        )

    def relative_step(
        self, learning_rate: Floats, batch_size: Integers | Floats, momentum: Floats
    ) -> Floats:
        """Return effective learning rates times the largest curvature, shape ``(K,)``."""
        del batch_size
        return learning_rate / (1.0 - momentum) * float(self.eigen.curvatures[0])

    @property
    def _slow_rate(self) -> float:
        """A learning rate at which full-batch training is slow and stable: 0.5 / curvature."""
        return 0.5 / max(float(self.eigen.curvatures[0]), 1e-30)

    def slow_run(
        self, target: Target, *, max_steps: int = 5_000, full_curves: bool = False
    ) -> Trajectories:
        """Return the curves of slow full-batch training without momentum, one configuration."""
        return _slow_run(
            self.eigen, self._slow_rate, target, max_steps=max_steps, full_curves=full_curves
        )

    def sample_convergence(
        self, target: Target, growth: KernelGrowth | None, seed: int
    ) -> SampleConvergence:
        """Return times as a function of the number of samples, by plain gradient descent."""
        return SampleConvergence.measure(self.eigen, target, growth=growth, seed=seed)

    def approximation_log_error(self, target: Target) -> float:
        """Return the absolute change of a log time due to the eigenpairs that are not there.

        It is estimated by dropping as much of the trace again; 1 if a target is not reached then.
        """
        explained, spectrum = self.spectrum.explained_trace, self.spectrum
        if explained > 1.0 - 1e-6 or target.settled:
            return 0.0
        shorter = spectrum.truncate(explained_trace=max(1.0 - 2.0 * (1.0 - explained), 0.01))
        if shorter.rank == spectrum.rank and spectrum.rank > 1:
            # Equal eigenvalues are kept together.
            shorter = spectrum.truncate(rank=spectrum.rank - 1)
        models = (self.eigen, LinearisedModel.from_spectrum(shorter))
        if target.quantity == "smoothed_loss":
            target = replace(target, quantity="loss")
        times = [_slow_first_passage_time(m, self._slow_rate, target) for m in models]
        if min(times) < RULES.few_steps:
            rate = self._slow_rate / RULES.few_steps
            times = [_slow_first_passage_time(m, rate, target) for m in models]
        if not np.isfinite(times).all():
            return 1.0
        return abs(math.log(max(times[1], 1.0) / max(times[0], 1.0)))

    def surface(
        self, target: Target, levels: Floats, growth: KernelGrowth | None, max_steps: int
    ) -> ResponseSurface | None:
        """Return the response surface of simulated times; None with parameter groups."""
        if self.optimizer.groups is not None:
            return None
        share = min(RULES.surface_trace, self.spectrum.explained_trace)
        model = LinearisedModel.from_spectrum(
            self.spectrum.truncate(explained_trace=share), device=self.settings.device
        )
        return SGDSurface.build(
            model,
            target,
            levels,
            max_steps=max_steps,
            optimizer=self.optimizer,
            sampling=self.settings.sampling,
            smoothing=self.settings.smoothing,
            growth=growth,
            limit=self.growth_limit,
            saturation=self.saturation,
            seed=self.settings.seed,
        )


def _slow_run(
    model: LinearisedModel,
    learning_rate: float,
    target: Target,
    *,
    max_steps: int = 5_000,
    full_curves: bool = False,
) -> Trajectories:
    """Return the curves of full-batch training with one learning rate and no momentum."""
    return simulate(
        model,
        SGDConfigurations.of(np.array([learning_rate])),
        np.array([model.n_samples]),
        max_steps=np.array([max_steps]),
        target=target,
        full_curves=full_curves,
    )


def _slow_first_passage_time(
    model: LinearisedModel, learning_rate: float, target: Target
) -> float:
    """Return the full-batch steps to a target, infinity if it is not reached."""
    return float(_slow_run(model, learning_rate, target).first_passage_times(target)[0])
