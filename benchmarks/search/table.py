"""A recorded task as a search meets it: what a configuration costs, epoch by epoch, and gives."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
import math
from pathlib import Path
from typing import Any
from typing import Literal

import numpy as np
from numpy.typing import NDArray
import optuna

from benchmarks.search.recording import Run
from optuna_ttp import HyperparameterMap


Goal = Literal["metric", "time"]
# Targets of a regression are uniform between -1 and 1.
_TARGET_VARIANCE = 1.0 / 3.0
# The training loss to reach, as a share of the initial one, where time is the objective.
TARGET_FRACTION = 0.15
# How close to the best of the grid a search has to come.
_CLOSE = {"metric": 0.01, "time": 0.1}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What happens to a trial of one configuration if nobody stops it.

    Attributes:
        seconds:
            That each epoch takes, shape ``(E,)``.
        reports:
            What the objective reports after each epoch, likewise; NaN is not reported.
        value:
            What it returns in the end; NaN where it gives up on the trial.
        batch_losses:
            Training losses of the mini-batches, epoch by epoch.
        training_losses:
            Over all samples after 0, 1, ... epochs.
        steps_per_epoch:
            Of a whole one.
    """

    seconds: NDArray[np.float64]
    reports: NDArray[np.float64]
    value: float
    batch_losses: tuple[NDArray[np.float64], ...] = ()
    training_losses: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    steps_per_epoch: int = 1

    @property
    def total_seconds(self) -> float:
        """What the whole trial takes."""
        return float(self.seconds.sum())


@dataclass(frozen=True, eq=False)
class Table:
    """All configurations of a task.

    Trials suggest the place of each hyperparameter in the grid's ascending list of values, a whole
    number, so that every sampler knows their order and none proposes what was not recorded.

    Attributes:
        name:
            Of the task.
        goal:
            ``"metric"``, the best validation metric after so many epochs; or ``"time"``, the
            seconds to a training loss.
        values:
            The values of each hyperparameter, ascending.
        trajectories:
            By places in the lists of values.
        direction:
            ``"minimize"`` or ``"maximize"``.
        n_epochs:
            Of a trial that nobody stops.
    """

    name: str
    goal: Goal
    values: dict[str, tuple[float, ...]]
    trajectories: dict[tuple[int, ...], Trajectory]
    direction: Literal["minimize", "maximize"]
    n_epochs: int

    @property
    def search_space(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What a trial suggests."""
        return {
            name: optuna.distributions.IntDistribution(0, len(values) - 1)
            for name, values in self.values.items()
        }

    def hyperparameters(self) -> HyperparameterMap:
        """Return how our sampler and pruner read the trials."""
        return HyperparameterMap(
            learning_rate=_reader("learning_rate", self.values["learning_rate"]),
            batch_size=_reader("batch_size", [int(v) for v in self.values["batch_size"]]),
            momentum=_reader("momentum", self.values["momentum"]),
        )

    def suggest(self, trial: optuna.Trial) -> tuple[int, ...]:
        """Return a trial's places in the grid.

        Args:
            trial:
                The trial.

        Returns:
            A key of :attr:`trajectories`.
        """
        return tuple(
            trial.suggest_int(name, 0, len(values) - 1) for name, values in self.values.items()
        )

    def loss(self, value: float) -> float:
        """Return a value so that lower is better.

        Args:
            value:
                Of the objective.

        Returns:
            The value or its negative.
        """
        return value if self.direction == "minimize" else -value

    @cached_property
    def _finished(self) -> NDArray[np.float64]:
        """The values of all configurations that are not given up."""
        values = np.array([t.value for t in self.trajectories.values()])
        return np.asarray(values[np.isfinite(values)])

    @cached_property
    def best(self) -> float:
        """The best value of the grid."""
        return float(
            self._finished.min() if self.direction == "minimize" else self._finished.max()
        )

    @cached_property
    def median(self) -> float:
        """The median value of the grid."""
        return float(np.median(self._finished))

    @property
    def close(self) -> float:
        """The value that is close enough to the best: within 1 %, or 10 % where it is a time."""
        share = _CLOSE[self.goal]
        return self.best + (share if self.direction == "minimize" else -share) * abs(self.best)

    def is_close(self, value: float) -> bool:
        """Tell whether a value is close enough to the best.

        Args:
            value:
                Of the objective; NaN is not.

        Returns:
            Whether it is.
        """
        return self.loss(value) <= self.loss(self.close) + 1e-12

    def regret(self, value: float) -> float:
        """Return how far a value is from the best, where the grid's median is at one.

        The worst values of a grid are whatever diverging runs end at, so that a scale from the
        best to the worst would say nothing.

        Args:
            value:
                Of the objective.

        Returns:
            The normalised regret, from zero to one; one where there is no value.
        """
        scale = abs(self.median - self.best)
        if not math.isfinite(value) or scale == 0.0:
            return 1.0
        return min(1.0, abs(value - self.best) / scale)

    @cached_property
    def oracle_seconds(self) -> float:
        """What a search takes that runs the cheapest configuration close to the best, only."""
        return min(t.total_seconds for t in self.trajectories.values() if self.is_close(t.value))

    @cached_property
    def mean_seconds(self) -> float:
        """What a configuration takes on average, if nobody stops it."""
        return float(np.mean([t.total_seconds for t in self.trajectories.values()]))


def from_recording(name: str, runs: Sequence[Run], goal: Goal) -> Table:
    """Build the table of a recorded task.

    Every epoch of a batch size is charged the median of its recorded seconds, so that a busy
    minute of the machine does not decide which configuration was the fastest.

    Args:
        name:
            Of the task.
        runs:
            All runs of the grid.
        goal:
            What trials are to find.

    Returns:
        The table.

    Raises:
        ValueError:
            If runs of the grid are missing.
    """
    values = {
        "learning_rate": tuple(sorted({run.learning_rate for run in runs})),
        "batch_size": tuple(sorted({float(run.batch_size) for run in runs})),
        "momentum": tuple(sorted({run.momentum for run in runs})),
    }
    if len(runs) != math.prod(map(len, values.values())):
        raise ValueError(
            f"A recording must hold every run of its grid but {name} holds {len(runs)} of "
            f"{' x '.join(str(len(v)) for v in values.values())}. Record the rest with "
            f"python -m benchmarks.search.record {name}."
        )
    seconds = {
        a_batch_size: float(
            np.median(
                np.concatenate([r.training_seconds for r in runs if r.batch_size == a_batch_size])
            )
        )
        for a_batch_size in {run.batch_size for run in runs}
    }
    validation = float(np.median([run.validation_seconds for run in runs]))
    n_epochs = max(run.n_epochs for run in runs)
    # Runs that were given up have fewer.
    steps = {
        a_batch_size: max(len(r.batch_losses) for r in runs if r.batch_size == a_batch_size)
        // n_epochs
        for a_batch_size in seconds
    }
    build = _metric_trajectory if goal == "metric" else _time_trajectory
    trajectories = {
        tuple(values[key].index(float(getattr(run, key))) for key in values): build(
            run, seconds[run.batch_size], validation, n_epochs, steps[run.batch_size]
        )
        for run in runs
    }
    direction: Literal["minimize", "maximize"] = "maximize" if goal == "metric" else "minimize"
    return Table(name, goal, values, trajectories, direction, n_epochs)


def recorded(name: str, folder: Path, goal: Goal) -> Table:
    """Read the table of a recorded task.

    Args:
        name:
            Of the task.
        folder:
            Of the recordings.
        goal:
            What trials are to find.

    Returns:
        The table.
    """
    from benchmarks.search.recording import read

    return from_recording(name, read(folder / f"{name}.npz"), goal)


def _metric_trajectory(
    run: Run, epoch_seconds: float, validation_seconds: float, n_epochs: int, steps: int
) -> Trajectory:
    """Trained for all epochs and validated after each; given up on a loss of NaN."""
    if np.isnan(run.training_accuracy[0]):
        metric = 1.0 - run.validation_loss / _TARGET_VARIANCE
    else:
        metric = run.validation_accuracy
    reports = metric[1:]
    finished = run.n_epochs == n_epochs and math.isfinite(reports[-1])
    return Trajectory(
        np.full(run.n_epochs, epoch_seconds + validation_seconds),
        reports,
        float(reports[-1]) if finished else math.nan,
        _by_epoch(run, steps),
        run.training_loss,
        steps,
    )


def _time_trajectory(
    run: Run, epoch_seconds: float, validation_seconds: float, n_epochs: int, steps: int
) -> Trajectory:
    """Trained until the training loss is at the target; given up where it never gets there."""
    losses = run.training_loss
    target = TARGET_FRACTION * losses[0]
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return Trajectory(
            np.full(run.n_epochs, epoch_seconds),
            losses[1:],
            math.nan,
            _by_epoch(run, steps),
            losses,
            steps,
        )
    last = int(reached[0])
    before, after = losses[last - 1], losses[last]
    share = math.log(before / target) / math.log(before / after)
    seconds = np.full(last, epoch_seconds)
    seconds[-1] *= share
    by_epoch = _by_epoch(run, steps)[:last]
    taken = max(1, math.ceil(share * len(by_epoch[-1])))
    return Trajectory(
        seconds,
        np.append(losses[1:last], np.nan),
        float(seconds.sum()),
        (*by_epoch[:-1], by_epoch[-1][:taken]),
        losses,
        steps,
    )


def _by_epoch(run: Run, per_epoch: int) -> tuple[NDArray[np.float64], ...]:
    """The losses of each epoch; the last one may be cut short."""
    return tuple(
        run.batch_losses[k * per_epoch : (k + 1) * per_epoch] for k in range(run.n_epochs)
    )


def _reader(name: str, values: Sequence[float]) -> Callable[[Any], float]:
    return lambda params: values[params[name]]
