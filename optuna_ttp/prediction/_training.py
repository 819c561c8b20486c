"""What predictions ask of an optimiser: a model, a scale of learning rates, a slow regime."""

from __future__ import annotations

from typing import Protocol

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Saturation
from optuna_ttp.dynamics import StabilityLimit
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories


class Training(Protocol):
    """What is particular to training one task by one kind of optimiser."""

    @property
    def model(self) -> LinearisedModel:
        """The model that is simulated."""

    @property
    def growth_exponent(self) -> float:
        """The power of the kernel's growth with which training becomes faster."""

    @property
    def hopeless_stability(self) -> float:
        """The learning rate over the largest stable one above which training always fails."""

    @property
    def growth_limit(self) -> StabilityLimit | None:
        """The limit up to which the kernel grows in simulations; None if it grows without."""

    @property
    def saturation(self) -> Saturation | None:
        """How much large steps are slowed; None if that was not measured, or is not wanted."""

    def max_learning_rate(self, batch_size: Integers | Floats, momentum: Floats) -> Floats:
        """Return the largest stable learning rates of K configurations, shape ``(K,)``."""

    def relative_step(
        self, learning_rate: Floats, batch_size: Integers | Floats, momentum: Floats
    ) -> Floats:
        """Return the step over the scale of the steepest direction, shape ``(K,)``."""

    def slow_run(
        self, target: Target, *, max_steps: int = 5_000, full_curves: bool = False
    ) -> Trajectories:
        """Return the curves of slow full-batch training, one configuration."""

    def sample_convergence(
        self, target: Target, growth: KernelGrowth | None, seed: int
    ) -> SampleConvergence:
        """Return times as a function of the number of samples."""

    def approximation_log_error(self, target: Target) -> float:
        """Return the absolute error of a log time due to what the spectrum lacks."""

    def surface(
        self, target: Target, levels: Floats, growth: KernelGrowth | None, max_steps: int
    ) -> ResponseSurface | None:
        """Return the response surface of simulated times; None if times have no surface."""
