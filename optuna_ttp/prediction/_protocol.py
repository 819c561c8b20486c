"""What a search asks of a predictor."""

from __future__ import annotations

from typing import Any
from typing import Protocol
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from numpy.typing import ArrayLike

    from optuna_ttp._util.arrays import Floats
    from optuna_ttp._util.arrays import Integers
    from optuna_ttp.calibration import Calibration
    from optuna_ttp.calibration import Observation
    from optuna_ttp.dynamics import Target
    from optuna_ttp.prediction._prediction import Prediction
    from optuna_ttp.spectrum import Throughput


class SearchPredictor(Protocol):
    """What sampler, pruner, training log and report call on a predictor.

    :class:`~optuna_ttp.TrainingTimePredictor` is the predictor of this package. Whatever else has
    these attributes and methods can steer a search, too. "Depth" is the logarithm of the initial
    training loss over a lower one.
    """

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the task; predictions for other tasks are left out."""

    @property
    def setup_seconds(self) -> float:
        """What the predictor cost before the first trial, in seconds."""

    @property
    def n_samples(self) -> int:
        """The number of samples that are trained on."""

    @property
    def max_steps(self) -> int:
        """The horizon of predictions, in optimiser steps."""

    @property
    def default_momentum(self) -> float | None:
        """The momentum of trials that do not give one, or None where they must give one."""

    @property
    def target(self) -> Target:
        """The quantity that is watched, and the value that it is to reach."""

    @property
    def target_depth(self) -> float:
        """The depth at the target; NaN where it is not known in advance."""

    @property
    def best_depth(self) -> float:
        """The depth at which the validation loss is predicted to be lowest, or infinity."""

    @property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""

    @property
    def initial_loss_sd(self) -> float:
        """The standard deviation of the losses of single samples at the pretrained weights."""

    @property
    def throughput(self) -> Throughput | None:
        """Seconds of a training step by batch size, or None where they were not measured."""

    @property
    def calibration(self) -> Calibration:
        """What observed trials have taught, and how far predictions can be trusted."""

    @property
    def observations(self) -> tuple[Observation, ...]:
        """The trials that the predictor has learned from, oldest first."""

    @property
    def has_surface(self) -> bool:
        """Whether :meth:`score` of many configurations takes microseconds each."""

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict configurations that are broadcast together, in milliseconds, without curves."""

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        simulate_outside: bool = True,
    ) -> Floats:
        """Return seconds to the target (steps where there is no throughput), to rank by."""

    def depth_after(
        self, learning_rate: Floats, batch_size: Integers, momentum: Floats, steps: Floats
    ) -> Floats:
        """Return the depth of K configurations after some steps each; all of shape ``(K,)``."""

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Return how many steps a running trial still needs to a depth (the target's by default).

        The second number is the standard deviation of their logarithm. The configuration is the
        learning rate, batch size and momentum. None means that nothing is known.
        """

    def seconds_per_step(self, batch_size: ArrayLike) -> Floats:
        """Return the seconds of a training step, of the same shape; NaN where it is not known."""

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> Floats:
        """Return the largest stable learning rate, of the common shape."""

    def informed(self, observations: Sequence[Observation]) -> Self:
        """Return a predictor that has learned from more trials; itself where none is new."""


_MEMBERS = tuple(name for name in vars(SearchPredictor) if not name.startswith("_"))


def check_predictor(value: Any) -> None:
    """Raise TypeError if a value lacks what :class:`SearchPredictor` lists.

    The names are looked up without reading properties, which may simulate for seconds.
    """
    present = set(dir(value))
    missing = [name for name in _MEMBERS if name not in present]
    if not missing:
        return
    text = f"predictor must be a TrainingTimePredictor but got {type(value).__name__}"
    if len(missing) < len(_MEMBERS):
        text += f", which lacks {', '.join(missing)}"
    raise TypeError(f"{text}.")
