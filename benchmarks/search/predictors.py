"""Predictors to compare ours with: shuffled, a rule of thumb, and what the recording says."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from benchmarks.search.table import Table
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import Observation
from optuna_ttp.prediction import Outcome
from optuna_ttp.prediction import Prediction


Steps = Callable[
    [NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]
]
# Losses are not predicted to fall further than so many targets on a logarithmic scale.
_MOST_TARGETS = 4.0
# A learning rate that no search gets near.
_UNLIMITED = 1e6
# What a predictor with given times says about their scatter.
_LOG_SD = 0.2


def _of_base(name: str) -> Any:
    """Return a property, or method, that is the one of this name of ``self.base``."""
    return property(lambda self: getattr(self.base, name))


class _DerivedPredictor:
    """Answers what does not depend on predicted times as the predictor that it is derived from."""

    def __init__(self, base: TrainingTimePredictor) -> None:
        self.base = base

    fingerprint = _of_base("fingerprint")
    setup_seconds = _of_base("setup_seconds")
    n_samples = _of_base("n_samples")
    max_steps = _of_base("max_steps")
    default_momentum = _of_base("default_momentum")
    target = _of_base("target")
    target_depth = _of_base("target_depth")
    best_depth = _of_base("best_depth")
    initial_loss = _of_base("initial_loss")
    initial_loss_sd = _of_base("initial_loss_sd")
    throughput = _of_base("throughput")
    calibration = _of_base("calibration")
    observations = _of_base("observations")
    has_surface = _of_base("has_surface")
    seconds_per_step = _of_base("seconds_per_step")

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Return nothing: a trial's own curve would correct what was predicted on purpose."""
        return None

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """Return a limit that no search comes near: nothing is predicted about stability."""
        shape = np.broadcast_shapes(np.shape(batch_size), np.shape(self._momentum(momentum)))
        return np.full(shape, _UNLIMITED)

    def _momentum(self, momentum: ArrayLike | None) -> ArrayLike:
        return (self.default_momentum or 0.0) if momentum is None else momentum


class ShuffledPredictor(_DerivedPredictor):
    """Predicts for each configuration of a grid what ours predicts for another one.

    Args:
        base:
            Our predictor.
        values:
            The values of learning rate, batch size and momentum in the grid.
        order:
            The permutation of the grid's places.
    """

    def __init__(
        self,
        base: TrainingTimePredictor,
        values: tuple[NDArray[np.float64], ...],
        order: NDArray[np.int64],
    ) -> None:
        super().__init__(base)
        self._values = values
        self._order = order

    @classmethod
    def of(cls, predictor: TrainingTimePredictor, table: Table, seed: int) -> ShuffledPredictor:
        """Shuffle what a predictor says of the table's grid, by a permutation of this seed."""
        values = _columns(table)
        count = math.prod(map(len, values))
        return cls(predictor, values, np.random.default_rng(seed).permutation(count))

    def informed(self, observations: Sequence[Observation]) -> ShuffledPredictor:
        """Return a shuffled predictor whose base knows more trials."""
        base = self.base.informed(observations)
        return self if base is self.base else ShuffledPredictor(base, self._values, self._order)

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict what the base estimates for the other configurations."""
        others = self._others(learning_rate, batch_size, self._momentum(momentum))
        return self.base.estimate(*others, max_steps=max_steps)

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        simulate_outside: bool = True,
    ) -> NDArray[np.float64]:
        """Return the scores of the other configurations."""
        others = self._others(learning_rate, batch_size, self._momentum(momentum))
        return self.base.score(*others, simulate_outside=simulate_outside)

    def depth_after(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.int64],
        momentum: NDArray[np.float64],
        steps: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return the depths of other configurations; of those of the others, as recorded."""
        others = self._others(*self._others(learning_rate, batch_size, momentum))
        return self.base.depth_after(*others, steps)

    def _others(
        self, learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Return the configurations whose predictions are given for these, of one shape."""
        wanted = (np.asarray(a, dtype=np.float64) for a in (learning_rate, batch_size, momentum))
        columns = zip(self._values, np.broadcast_arrays(*wanted), strict=True)
        places = [_nearest(column, values) for column, values in columns]
        shape = tuple(map(len, self._values))
        others = np.unravel_index(self._order[np.ravel_multi_index(places, shape)], shape)
        rate, batch_sizes, momenta = (c[k] for c, k in zip(self._values, others, strict=True))
        return rate, np.minimum(batch_sizes, self.n_samples).astype(np.int64), momenta


class GivenTimesPredictor(_DerivedPredictor):
    """Predicts the steps that a function gives: a rule of thumb, or what was recorded.

    Args:
        base:
            Our predictor, for everything else.
        steps:
            From learning rates, batch sizes and momenta to steps to the target; infinite where it
            is not reached.
        learns:
            Whether a common factor is learned from the trials. It is not by default.
        log_factor:
            Logarithm of the factor that was learned.
    """

    def __init__(
        self,
        base: TrainingTimePredictor,
        steps: Steps,
        *,
        learns: bool = False,
        log_factor: float = 0.0,
    ) -> None:
        super().__init__(base)
        self._steps = steps
        self._learns = learns
        self._log_factor = log_factor

    @property
    def has_surface(self) -> bool:
        """Nothing is interpolated."""
        return False

    def informed(self, observations: Sequence[Observation]) -> GivenTimesPredictor:
        """Return a predictor that knows more trials, and learns the factor where it is to."""
        base = self.base.informed(observations)
        if base is self.base:
            return self
        log_factor = self._log_factor
        if self._learns:
            away = np.concatenate([o.observed - o.predicted for o in base.observations])
            if np.isfinite(away).any():
                log_factor = float(np.nanmedian(away))
        return GivenTimesPredictor(base, self._steps, learns=self._learns, log_factor=log_factor)

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict the given times."""
        horizon = np.asarray(self.max_steps if max_steps is None else max_steps)
        # Simulating one step fills in all that the times do not depend on.
        plain = self.base.predict(learning_rate, batch_size, momentum, max_steps=1)
        given = self._given(plain.learning_rate, plain.batch_size, plain.momentum)
        steps = np.where(given <= horizon, given, np.inf)
        # As if the loss fell exponentially: every depth takes its share of the time.
        depth = -math.log(self.base.depth)
        levels = np.where(depth * 1.0001 >= DEPTHS, np.log(DEPTHS / depth), np.nan)
        times = np.log(np.where(np.isfinite(given), given, np.nan))[..., None] + levels
        spread = math.exp(1.28 * _LOG_SD)
        return replace(
            plain,
            steps=steps,
            steps_low=np.maximum(1.0, given / spread),
            steps_high=given * spread,
            epochs=steps / np.ceil(self.n_samples / plain.batch_size),
            seconds=steps * self.seconds_per_step(plain.batch_size),
            outcomes=np.where(
                np.isfinite(steps), Outcome.CONVERGES.value, Outcome.NOT_REACHED.value
            ),
            p_converges=_below(given, horizon),
            p_diverges=np.zeros_like(steps),
            reliable=np.ones(steps.shape, dtype=bool),
            max_steps=np.broadcast_to(horizon, steps.shape),
            log_first_passage_times=times - self._log_factor,
            expected_log_first_passage_times=times,
        )

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        simulate_outside: bool = True,
    ) -> NDArray[np.float64]:
        """Return the seconds that the given steps take."""
        one_shape = np.broadcast_arrays(learning_rate, batch_size, self._momentum(momentum))
        given = self._given(*one_shape)
        per_step = self.seconds_per_step(one_shape[1])
        seconds = given * np.where(np.isnan(per_step), 1.0, per_step)
        return np.asarray(np.where(given <= self.max_steps, seconds, np.inf))

    def depth_after(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.int64],
        momentum: NDArray[np.float64],
        steps: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return how deep the loss is, as if it fell exponentially."""
        given = self._given(learning_rate, batch_size, momentum)
        return np.asarray(-math.log(self.base.depth) * np.minimum(steps / given, _MOST_TARGETS))

    def _given(
        self, learning_rate: NDArray[Any], batch_size: NDArray[Any], momentum: NDArray[Any]
    ) -> NDArray[np.float64]:
        steps = self._steps(learning_rate, batch_size.astype(np.float64), momentum)
        return np.asarray(np.ceil(steps * math.exp(self._log_factor)))


def rule_of_thumb(predictor: TrainingTimePredictor, table: Table) -> GivenTimesPredictor:
    """Return ``T = c / lr`` with the constant that agrees best with our predictions of the grid.

    Args:
        predictor:
            Ours.
        table:
            Has the grid.

    Returns:
        A predictor, which learns the constant from the trials.
    """
    rate, batch_size, momentum = _configurations(table, predictor.n_samples)
    per_step = predictor.seconds_per_step(batch_size)
    steps = predictor.score(rate, batch_size, momentum) / np.where(
        np.isnan(per_step), 1.0, per_step
    )
    constants = (steps * rate)[np.isfinite(steps)]
    constant = float(np.median(constants)) if len(constants) else 1.0
    return GivenTimesPredictor(
        predictor, lambda rate, batch_size, momentum: constant / rate, learns=True
    )


def recorded_times(
    predictor: TrainingTimePredictor, table: Table, *, log_sd: float = 0.0, seed: int = 0
) -> GivenTimesPredictor:
    """Return a predictor that knows the recorded steps to its target, give or take an error.

    Args:
        predictor:
            Ours, which has the target.
        table:
            The recording.
        log_sd:
            Standard deviation of the error of the time's logarithm. None by default.
        seed:
            Of the errors.

    Returns:
        The predictor.
    """
    values = _columns(table)
    shape = tuple(map(len, values))
    target = predictor.target.value
    steps = np.full(shape, np.inf)
    for places, trajectory in table.trajectories.items():
        losses = trajectory.training_losses
        below = np.flatnonzero(losses <= target)
        if len(below):
            k = int(below[0])
            if k == 0:
                steps[places] = 1.0
                continue
            share = math.log(losses[k - 1] / target) / math.log(losses[k - 1] / losses[k])
            steps[places] = max(1.0, (k - 1 + share) * trajectory.steps_per_epoch)
    errors = np.random.default_rng(seed).normal(0.0, log_sd, shape) if log_sd else np.zeros(shape)

    def disturbed(
        rate: NDArray[np.float64],
        batch_size: NDArray[np.float64],
        momentum: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        columns = zip(values, (rate, batch_size, momentum), strict=True)
        places = tuple(_nearest(column, wanted) for column, wanted in columns)
        return np.asarray(steps[places] * np.exp(errors[places]))

    return GivenTimesPredictor(predictor, disturbed)


def _columns(table: Table) -> tuple[NDArray[np.float64], ...]:
    names = ("learning_rate", "batch_size", "momentum")
    return tuple(np.array(table.values[name], dtype=np.float64) for name in names)


def _configurations(table: Table, n_samples: int) -> tuple[NDArray[Any], ...]:
    rate, batch_size, momentum = (m.ravel() for m in np.meshgrid(*_columns(table), indexing="ij"))
    return rate, np.minimum(batch_size, n_samples).astype(np.int64), momentum


def _nearest(column: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.asarray(np.abs(values[..., None] - column).argmin(axis=-1))


def _below(steps: NDArray[np.float64], horizon: NDArray[Any]) -> NDArray[np.float64]:
    from scipy.stats import norm

    away = np.log(horizon / np.where(np.isfinite(steps), steps, 1.0)) / _LOG_SD
    return np.asarray(np.where(np.isfinite(steps), norm.cdf(away), 0.0))
