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
from optuna_ttp.prediction import NOT_REACHED
from optuna_ttp.prediction import Prediction
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._prediction import CONVERGES


Steps = Callable[
    [NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]
]
# Losses are not told to fall further than so many targets on a logarithmic scale.
_MOST_TARGETS = 4.0
# A learning rate that no search gets near.
_UNLIMITED = 1e6
# What a predictor that is told its times says about their scatter.
_LOG_SD = 0.2


class ShuffledPredictor(TrainingTimePredictor):
    """Predicts for each configuration of a grid what ours predicts for another one."""

    _values: tuple[NDArray[np.float64], ...]
    _order: NDArray[np.int64]

    @classmethod
    def of(cls, predictor: TrainingTimePredictor, table: Table, seed: int) -> ShuffledPredictor:
        """Shuffle a predictor.

        Args:
            predictor:
                Ours.
            table:
                Has the grid.
            seed:
                Of the permutation.

        Returns:
            A predictor that shares everything else with it.
        """
        twin: ShuffledPredictor = _twin(cls, predictor)
        twin._values = _columns(table)
        count = math.prod(map(len, twin._values))
        twin._order = np.random.default_rng(seed).permutation(count)
        return twin

    def _check_configuration(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike,
        max_steps: ArrayLike,
    ) -> Configurations:
        own = super()._check_configuration(learning_rate, batch_size, momentum, max_steps)
        rate, size, mass = self._other(own.learning_rate, own.batch_size, own.momentum)
        return replace(own, learning_rate=rate, batch_size=size, momentum=mass)

    def depth_after(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.int64],
        momentum: NDArray[np.float64],
        steps: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return the depth of the other configuration."""
        return super().depth_after(*self._other(learning_rate, batch_size, momentum), steps)

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Say nothing: a trial's own curve would tell the truth."""
        return None

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike = 0.0
    ) -> NDArray[np.float64]:
        """Say nothing about stability."""
        return _unlimited(batch_size, momentum)

    def _other(
        self, rate: NDArray[np.float64], size: NDArray[np.int64], mass: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        wanted = (rate, size.astype(np.float64), mass)
        columns = zip(self._values, wanted, strict=True)
        places = [_nearest(column, values) for column, values in columns]
        shape = tuple(map(len, self._values))
        others = np.unravel_index(self._order[np.ravel_multi_index(places, shape)], shape)
        rate, sizes, mass = (c[k] for c, k in zip(self._values, others, strict=True))
        return rate, np.minimum(sizes, self.n_samples).astype(np.int64), mass


class ToldPredictor(TrainingTimePredictor):
    """Predicts the steps that it is told, by a rule or from the recording."""

    _steps: Steps
    _learns: bool
    _log_factor: float

    @classmethod
    def of(
        cls, predictor: TrainingTimePredictor, steps: Steps, *, learns: bool = False
    ) -> ToldPredictor:
        """Replace the times of a predictor.

        Args:
            predictor:
                Ours, for everything else.
            steps:
                Of learning rates, batch sizes and momenta to steps to the target; infinite where
                it is not reached.
            learns:
                Whether a common factor is learned from the trials. It is not by default.

        Returns:
            The predictor.
        """
        twin: ToldPredictor = _twin(cls, predictor)
        twin._steps = steps
        twin._learns = learns
        twin._log_factor = 0.0
        return twin

    def informed(self, observations: Sequence[Observation]) -> TrainingTimePredictor:
        """Return a predictor that knows more trials, and learns the factor where it is to."""
        twin = super().informed(observations)
        if self._learns and twin is not self and isinstance(twin, ToldPredictor):
            away = np.concatenate([o.observed - o.predicted for o in twin.observations])
            if np.isfinite(away).any():
                twin._log_factor = float(np.nanmedian(away))
        return twin

    def predict(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike = 0.0,
        *,
        max_steps: ArrayLike | None = None,
        full_curve: bool = False,
    ) -> Prediction:
        """Predict what it is told."""
        horizon = np.asarray(self.max_steps if max_steps is None else max_steps)
        # Simulating one step fills in all that the times do not depend on.
        plain = super().predict(learning_rate, batch_size, momentum, max_steps=1)
        told = self._told(plain.learning_rate, plain.batch_size, plain.momentum)
        steps = np.where(told <= horizon, told, np.inf)
        # As if the loss fell exponentially: every depth takes its share of the time.
        depth = -math.log(self.depth)
        levels = np.where(depth * 1.0001 >= DEPTHS, np.log(DEPTHS / depth), np.nan)
        passages = np.log(np.where(np.isfinite(told), told, np.nan))[..., None] + levels
        spread = math.exp(1.28 * _LOG_SD)
        return replace(
            plain,
            steps=steps,
            steps_low=np.maximum(1.0, told / spread),
            steps_high=told * spread,
            epochs=steps / np.ceil(self.n_samples / plain.batch_size),
            seconds=steps * self.seconds_per_step(plain.batch_size),
            outcomes=np.where(np.isfinite(steps), CONVERGES, NOT_REACHED),
            p_converges=_below(told, horizon),
            p_diverges=np.zeros_like(steps),
            reliable=np.ones(steps.shape, dtype=bool),
            max_steps=np.broadcast_to(horizon, steps.shape),
            log_first_passage_times=passages - self._log_factor,
            expected_log_first_passage_times=passages,
        )

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike = 0.0,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict what it is told."""
        return self.predict(learning_rate, batch_size, momentum, max_steps=max_steps)

    @property
    def has_surface(self) -> bool:
        """Nothing is interpolated."""
        return False

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike = 0.0,
        *,
        simulate_outside: bool = True,
    ) -> NDArray[np.float64]:
        """Score by what it is told."""
        chosen = self._check_configuration(learning_rate, batch_size, momentum, self.max_steps)
        told = self._told(chosen.learning_rate, chosen.batch_size, chosen.momentum)
        per_step = self.seconds_per_step(chosen.batch_size)
        seconds = told * np.where(np.isnan(per_step), 1.0, per_step)
        return np.where(told <= chosen.max_steps, seconds, np.inf).reshape(chosen.shape)

    def depth_after(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.int64],
        momentum: NDArray[np.float64],
        steps: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return how deep the loss is, as if it fell exponentially."""
        told = self._told(learning_rate, batch_size, momentum)
        return np.asarray(-math.log(self.depth) * np.minimum(steps / told, _MOST_TARGETS))

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Say nothing: it is told times before the first step only."""
        return None

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike = 0.0
    ) -> NDArray[np.float64]:
        """Say nothing about stability."""
        return _unlimited(batch_size, momentum)

    def _told(
        self, rate: NDArray[Any], size: NDArray[Any], mass: NDArray[Any]
    ) -> NDArray[np.float64]:
        steps = self._steps(rate, size.astype(np.float64), mass)
        return np.asarray(np.ceil(steps * math.exp(self._log_factor)))


def rule_of_thumb(predictor: TrainingTimePredictor, table: Table) -> ToldPredictor:
    """Return ``T = c / lr`` with the constant that agrees best with our predictions of the grid.

    Args:
        predictor:
            Ours.
        table:
            Has the grid.

    Returns:
        A predictor, which learns the constant from the trials.
    """
    rate, size, mass = _configurations(table, predictor.n_samples)
    per_step = predictor.seconds_per_step(size)
    steps = predictor.score(rate, size, mass) / np.where(np.isnan(per_step), 1.0, per_step)
    constants = (steps * rate)[np.isfinite(steps)]
    constant = float(np.median(constants)) if len(constants) else 1.0
    return ToldPredictor.of(predictor, lambda rate, size, mass: constant / rate, learns=True)


def recorded_times(
    predictor: TrainingTimePredictor, table: Table, *, log_sd: float = 0.0, seed: int = 0
) -> ToldPredictor:
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

    def told(
        rate: NDArray[np.float64], size: NDArray[np.float64], mass: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        columns = zip(values, (rate, size, mass), strict=True)
        places = tuple(_nearest(column, wanted) for column, wanted in columns)
        return np.asarray(steps[places] * np.exp(errors[places]))

    return ToldPredictor.of(predictor, told)


def _twin(cls: Any, predictor: TrainingTimePredictor) -> Any:
    twin = object.__new__(cls)
    twin.__dict__.update(predictor.__dict__)
    return twin


def _unlimited(batch_size: ArrayLike, momentum: ArrayLike) -> NDArray[np.float64]:
    return np.full(np.broadcast_shapes(np.shape(batch_size), np.shape(momentum)), _UNLIMITED)


def _columns(table: Table) -> tuple[NDArray[np.float64], ...]:
    names = ("learning_rate", "batch_size", "momentum")
    return tuple(np.array(table.values[name], dtype=np.float64) for name in names)


def _configurations(table: Table, n_samples: int) -> tuple[NDArray[Any], ...]:
    rate, size, mass = (m.ravel() for m in np.meshgrid(*_columns(table), indexing="ij"))
    return rate, np.minimum(size, n_samples).astype(np.int64), mass


def _nearest(column: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.asarray(np.abs(values[..., None] - column).argmin(axis=-1))


def _below(steps: NDArray[np.float64], horizon: NDArray[Any]) -> NDArray[np.float64]:
    from scipy.stats import norm

    away = np.log(horizon / np.where(np.isfinite(steps), steps, 1.0)) / _LOG_SD
    return np.asarray(np.where(np.isfinite(steps), norm.cdf(away), 0.0))
