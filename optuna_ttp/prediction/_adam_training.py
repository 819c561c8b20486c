"""Training by Adam or AdamW, as far as predictions are concerned."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics import Adam
from optuna_ttp.dynamics import AdamSurface
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import natural_rate
from optuna_ttp.dynamics import PreconditionedLimit
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Saturation
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction._rules import RULES
from optuna_ttp.prediction._settings import PredictorSettings
from optuna_ttp.spectrum import Spectrum


if TYPE_CHECKING:
    from optuna_ttp.dynamics import AdamConfigurations
    from optuna_ttp.dynamics import StabilityLimit


@dataclass(frozen=True, eq=False)
class AdamTraining:
    """Training by Adam on the columns of a spectrum.

    ``n_samples`` is the number of samples that are trained on.
    """

    spectrum: Spectrum
    optimizer: Adam
    n_samples: int
    settings: PredictorSettings

    @cached_property
    def model(self) -> LinearisedModel:
        """The model that is simulated."""
        return LinearisedModel.from_columns(self.spectrum, device=self.settings.device)

    @property
    def growth_exponent(self) -> float:
        """One half: the size of the gradient cancels, that of the Jacobian does not."""
        return 0.5

    @property
    def hopeless_stability(self) -> float:
        """Infinity: above the limit the preconditioner adapts, and training may well succeed."""
        return math.inf

    @property
    def growth_limit(self) -> StabilityLimit | None:
        """None: the preconditioner adapts, so that the kernel may grow."""
        return None

    @cached_property
    def stability_limit(self) -> PreconditionedLimit:
        """The limit of stable learning rates with the preconditioner at the start."""
        return PreconditionedLimit.of(self.model, self.optimizer.eps, self.n_samples)

    @cached_property
    def saturation(self) -> Saturation | None:
        """How much large steps are slowed; None if that was not measured, or is not wanted."""
        measured = self.spectrum.saturation
        if measured is None or not self.settings.saturation:
            return None
        return Saturation.from_measurement(
            measured.adam_batch_sizes,
            measured.adam_rates,
            measured.adam_ratios,
        )

    def max_learning_rate(self, batch_size: Integers | Floats, momentum: Floats) -> Floats:
        """Return the largest stable learning rates of K configurations, shape ``(K,)``."""
        return self.stability_limit.max_learning_rate(batch_size, momentum)

    def relative_step(
        self, learning_rate: Floats, batch_size: Integers | Floats, momentum: Floats
    ) -> Floats:
        """Return twice the learning rate over the largest stable one, shape ``(K,)``.

        For plain gradient descent that is the learning rate times the largest curvature.
        """
        return 2.0 * learning_rate / self.max_learning_rate(batch_size, momentum)

    @cached_property
    def _slow(self) -> AdamConfigurations:
        """A slow configuration."""
        rate = natural_rate(self.model) / RULES.adam_steps
        return self.optimizer.configurations(rate, self.optimizer.betas[0])

    def slow_run(
        self, target: Target, *, max_steps: int = 5_000, full_curves: bool = False
    ) -> Trajectories:
        """Return the curves of slow full-batch training, one configuration."""
        return _slow_run(self.model, self._slow, target, max_steps, full_curves=full_curves)

    def sample_convergence(
        self, target: Target, growth: KernelGrowth | None, seed: int
    ) -> SampleConvergence:
        """Return times as a function of the number of samples, by slow full-batch training."""
        return SampleConvergence.measure(
            self.model,
            target,
            configurations=self._slow,
            growth=growth,
            max_steps=RULES.most_adam_steps,
            seed=seed,
        )

    def approximation_log_error(self, target: Target) -> float:
        """Return the absolute error of a log time due to the columns that are not there.

        It is the difference to the time with half of the columns: the error is one over their
        number, so that half of them have twice the error. 1 if a target is not reached.
        """
        jacobian = self.spectrum.jacobian
        assert jacobian is not None
        if target.settled or bool((jacobian.inflation == 1.0).all()):
            return 0.0
        if target.quantity == "smoothed_loss":
            target = replace(target, quantity="loss")
        rng = np.random.default_rng(self.settings.seed)
        half = replace(self.spectrum, jacobian=jacobian.thinned(jacobian.n_columns // 2, rng))
        models = self.model, LinearisedModel.from_columns(half, device=self.settings.device)
        times = [
            float(_slow_run(m, self._slow, target).first_passage_times(target)[0]) for m in models
        ]
        if not np.isfinite(times).all():
            return 1.0
        return abs(math.log(max(times[1], 1.0) / max(times[0], 1.0)))

    def surface(
        self, target: Target, levels: Floats, growth: KernelGrowth | None, max_steps: int
    ) -> ResponseSurface:
        """Return the response surface of simulated times, from a part of the columns."""
        model, jacobian = self.model, self.spectrum.jacobian
        assert jacobian is not None
        if jacobian.n_columns > RULES.surface_columns:
            rng = np.random.default_rng(self.settings.seed)
            part = replace(self.spectrum, jacobian=jacobian.thinned(RULES.surface_columns, rng))
            model = LinearisedModel.from_columns(part, device=self.settings.device)
        return AdamSurface.build(
            model,
            target,
            levels,
            max_steps=max_steps,
            optimizer=self.optimizer,
            sampling=self.settings.sampling,
            smoothing=self.settings.smoothing,
            growth=growth,
            saturation=self.saturation,
            seed=self.settings.seed,
        )


def _slow_run(
    model: LinearisedModel,
    configuration: AdamConfigurations,
    target: Target,
    max_steps: int = RULES.most_adam_steps,
    *,
    full_curves: bool = False,
) -> Trajectories:
    """Return the curves of full-batch training of one configuration."""
    return simulate(
        model,
        configuration,
        np.array([model.n_samples]),
        max_steps=np.array([min(max_steps, RULES.most_adam_steps)]),
        target=target,
        full_curves=full_curves,
    )
