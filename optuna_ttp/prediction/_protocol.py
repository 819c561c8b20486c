"""The interface of predictors that a search can use."""

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
    """The attributes and methods of a predictor that sampler, pruner, log and report use.

    :class:`~optuna_ttp.TrainingTimePredictor` is the predictor of this package; any other object
    with these members can guide a search, too. "Depth" is the logarithm of the initial training
    loss over a lower training loss.
    """

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the task; predictions for other tasks are ignored."""

    @property
    def setup_seconds(self) -> float:
        """The seconds that the predictor cost before the first trial."""

    @property
    def n_samples(self) -> int:
        """The number of samples that are trained on."""

    @property
    def max_steps(self) -> int:
        """The horizon of predictions, in optimiser steps."""

    @property
    def default_momentum(self) -> float | None:
        """The momentum of trials that do not give one, or None if every trial must give one."""

    @property
    def target(self) -> Target:
        """The quantity that training is to bring to a value, and this value."""

    @property
    def target_depth(self) -> float:
        """The depth at the target; NaN if it is not known in advance."""

    @property
    def best_depth(self) -> float:
        """The depth at which the predicted validation loss is lowest; infinity if not known."""

    @property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""

    @property
    def initial_loss_sd(self) -> float:
        """The standard deviation of the losses of single samples at the pretrained weights."""

    @property
    def throughput(self) -> Throughput | None:
        """The seconds per training step by batch size, or None if they were not measured."""

    @property
    def calibration(self) -> Calibration:
        """The corrections learned from observed trials, and whether predictions are trusted."""

    @property
    def observations(self) -> tuple[Observation, ...]:
        """The trials that the predictor has learned from, oldest first."""

    @property
    def has_surface(self) -> bool:
        """True if :meth:`score` takes only microseconds per configuration."""

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict configurations that are broadcast together, without curves, in milliseconds."""

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        simulate_outside: bool = True,
    ) -> Floats:
        """Return seconds to the target, or steps if :attr:`throughput` is None, or infinity."""

    def depth_after(
        self, learning_rate: Floats, batch_size: Integers, momentum: Floats, steps: Floats
    ) -> Floats:
        """Return the depths ``(K,)`` after ``steps`` ``(K,)``, zero if they are not known."""

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Return the steps that a running trial still needs to a depth, by default the target's.

        The second number is the standard deviation of their logarithm. The configuration is the
        learning rate, batch size and momentum. None if the predictor cannot tell.
        """

    def seconds_per_step(self, batch_size: ArrayLike) -> Floats:
        """Return the seconds per training step, in the same shape; NaN if they are not known."""

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> Floats:
        """Return the largest stable learning rate, in the common shape of the arguments."""

    def informed(self, observations: Sequence[Observation]) -> Self:
        """Return a predictor that has learned from more trials; itself if no trial is new."""


_MEMBERS = tuple(name for name in vars(SearchPredictor) if not name.startswith("_"))


def check_predictor(value: Any) -> None:
    """Raise TypeError if a value lacks a member of :class:`SearchPredictor`.

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
