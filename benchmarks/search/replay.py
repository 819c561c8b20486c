"""Searches over recorded tasks, with a simulated clock and any number of simulated workers.

A trial pays the recorded seconds of every epoch that it trains, and a pruned one up to the pruned
epoch. What Optuna's samplers and pruners and ours compute meanwhile is done for real, and charged
with the processor time that it takes. Workers share one study: whoever is free first asks for
the next trial, and sees the others as they are at that moment of the simulated clock.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from datetime import timedelta
from datetime import tzinfo
import heapq
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from benchmarks.search.table import Table
from benchmarks.search.table import Trajectory
from optuna_ttp.study import TrainingLog
import optuna_ttp.study._study_budget
import optuna_ttp.study._training_log


_BEGINNING = datetime(2020, 1, 1)


@dataclass
class Clock:
    """The simulated seconds.

    Attributes:
        now:
            Seconds since the search began.
    """

    now: float = 0.0

    def perf_counter(self) -> float:
        """Return what :func:`time.perf_counter` would."""
        return self.now

    def datetime(self) -> datetime:
        """Return what :meth:`datetime.datetime.now` would."""
        return _BEGINNING + timedelta(seconds=self.now)


@dataclass(frozen=True)
class Replayed:
    """One trial of a replayed search.

    Attributes:
        places:
            Of its configuration in the grid.
        began:
            Simulated seconds when it was asked for.
        ended:
            When it was told.
        epochs:
            That were trained; zero where it was pruned before.
        pruned:
            Whether the pruner stopped it.
        value:
            Of the objective; NaN where it was pruned or given up.
    """

    places: tuple[int, ...]
    began: float
    ended: float
    epochs: int
    pruned: bool
    value: float


@dataclass(frozen=True, eq=False)
class Search:
    """A replayed search.

    Attributes:
        table:
            What was searched.
        trials:
            In the order in which they ended.
        setup_seconds:
            Charged before the first trial.
        overhead_seconds:
            Processor time of samplers, pruners and logs, as charged to all workers together.
        study:
            The study, with what was written on its trials.
    """

    table: Table
    trials: tuple[Replayed, ...]
    setup_seconds: float
    overhead_seconds: float
    study: optuna.Study

    @property
    def seconds_to_close(self) -> float:
        """Seconds until a trial ended close to the grid's best; infinity if none did."""
        return self._seconds_to(lambda trial: self.table.is_close(trial.value))

    @property
    def seconds_to_best(self) -> float:
        """Seconds until a trial ended with the grid's best value; infinity if none did."""
        best = self.table.loss(self.table.best) + 1e-12
        return self._seconds_to(lambda trial: self.table.loss(trial.value) <= best)

    def regret_at(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the normalised regret of the best value so far.

        Args:
            seconds:
                Simulated ones.

        Returns:
            The same shape; one before the first value.
        """
        regrets = np.ones(len(seconds))
        for trial in self.trials:
            later = seconds >= trial.ended
            regrets[later] = np.minimum(regrets[later], self.table.regret(trial.value))
        return regrets

    def winners(self) -> tuple[int, int]:
        """Count trials close to the grid's best that were asked for before one had ended.

        Returns:
            How many there were, and how many of them were pruned.
        """
        until = self.seconds_to_close
        winners = [
            trial
            for trial in self.trials
            if trial.began < until
            and self.table.is_close(self.table.trajectories[trial.places].value)
        ]
        return len(winners), sum(trial.pruned for trial in winners)

    def _seconds_to(self, is_good: Callable[[Replayed], bool]) -> float:
        return min((t.ended for t in self.trials if is_good(t)), default=math.inf)


def replay(
    table: Table,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    *,
    budget_seconds: float,
    n_workers: int = 1,
    setup_seconds: float = 0.0,
    logged: bool = False,
    max_trials: int = 1000,
    overhead: Callable[[], float] = time.process_time,
) -> Search:
    """Search a recorded task until the grid's best is found or the budget is spent.

    Args:
        table:
            The task.
        sampler:
            Any sampler.
        pruner:
            Any pruner.
        budget_seconds:
            Simulated ones. Trials that would end later do not count.
        n_workers:
            That share the study. One by default.
        setup_seconds:
            Charged before the first trial: the spectrum.
        logged:
            Whether trials keep their training losses in a :class:`optuna_ttp.TrainingLog`. They
            do not by default.
        max_trials:
            Where to stop at the latest.
        overhead:
            Tells the seconds that are charged for what is computed. Processor time by default,
            which a busy machine does not stretch.

    Returns:
        The search.
    """
    clock = Clock()
    trials: list[Replayed] = []
    charged = _Charged(clock, overhead)
    with _simulated(clock):
        study = optuna.create_study(
            storage=_Storage(clock), sampler=sampler, pruner=pruner, direction=table.direction
        )
        clock.now = setup_seconds
        events = [
            (setup_seconds, k, _worker(study, table, charged, trials, logged=logged))
            for k in range(n_workers)
        ]
        best = table.loss(table.best) + 1e-12
        heapq.heapify(events)
        count = n_workers
        while events:
            clock.now, _, worker = heapq.heappop(events)
            if clock.now > budget_seconds or len(study.get_trials(deepcopy=False)) > max_trials:
                break
            if trials and table.loss(trials[-1].value) <= best:
                break
            heapq.heappush(events, (clock.now + next(worker), count, worker))
            count += 1
    ended = tuple(trial for trial in trials if trial.ended <= budget_seconds)
    return Search(table, ended, setup_seconds, charged.total, study)


@dataclass
class _Charged:
    """Measures what is computed while the simulated clock stands still."""

    clock: Clock
    timer: Callable[[], float]
    total: float = 0.0

    def __call__(self, function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        started = self.timer()
        result = function(*args)
        seconds = self.timer() - started
        self.total += seconds
        return result, seconds


def _worker(
    study: optuna.Study,
    table: Table,
    charged: _Charged,
    trials: list[Replayed],
    *,
    logged: bool,
) -> Iterator[float]:
    """Run one trial after the other; yield the simulated seconds until it goes on."""
    while True:
        yield from _trial(study, table, charged, trials, logged=logged)


def _trial(
    study: optuna.Study,
    table: Table,
    charged: _Charged,
    trials: list[Replayed],
    *,
    logged: bool,
) -> Iterator[float]:
    clock = charged.clock
    began = clock.now

    def ask() -> tuple[optuna.Trial, tuple[int, ...], bool]:
        trial = study.ask()
        places = table.suggest(trial)
        return trial, places, trial.should_prune()

    (trial, places, pruned), seconds = charged(ask)
    yield seconds
    trajectory = table.trajectories[places]
    log = TrainingLog(trial) if logged else None
    epochs = 0
    while not pruned and epochs < len(trajectory.seconds):
        yield float(trajectory.seconds[epochs])
        seconds = 0.0
        if log is not None and len(trajectory.batch_losses):
            _, seconds = charged(_log, log, trajectory, epochs, clock)
        epochs += 1
        pruned, asking = charged(_report, trial, trajectory.reports[epochs - 1], epochs)
        yield seconds + asking
    value = math.nan if pruned else trajectory.value

    def tell() -> None:
        if log is not None and epochs:
            log.close()
        if math.isnan(value):
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, value)

    ended = clock.now
    _, seconds = charged(tell)
    # What it takes to tell delays the worker's next trial, not the value.
    trials.append(Replayed(places, began, ended, epochs, pruned, value))
    yield seconds


def _report(trial: optuna.Trial, value: float, epoch: int) -> bool:
    """Report a value; tell whether to prune. A last epoch without a value ends the trial."""
    if math.isnan(value):
        return False
    trial.report(value, epoch)
    return trial.should_prune()


def _log(log: TrainingLog, trajectory: Trajectory, epoch: int, clock: Clock) -> None:
    """Log the losses of the epoch that has just ended, with the times that they were taken at."""
    ended = clock.now
    losses = trajectory.batch_losses[epoch]
    step_seconds = float(trajectory.seconds[epoch]) / max(1, len(losses))
    for k, loss in enumerate(losses):
        clock.now = ended - (len(losses) - k) * step_seconds
        log.step(loss)
    clock.now = ended


class _Storage(InMemoryStorage):
    """Trials start and end at simulated times."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is None:
            self._get_trial(trial_id).datetime_start = self._clock.datetime()
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        changed = super().set_trial_state_values(trial_id, state, values)
        trial = self._get_trial(trial_id)
        if changed and state == TrialState.RUNNING:
            trial.datetime_start = self._clock.datetime()
        if state.is_finished():
            trial.datetime_complete = self._clock.datetime()
        return changed


@contextmanager
def _simulated(clock: Clock) -> Iterator[None]:
    """Let budget and log read the simulated clock where they tell how long training took."""

    class SimulatedDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return clock.datetime()

    replaced = [
        (optuna_ttp.study._training_log, "time", clock),
        (optuna_ttp.study._study_budget, "datetime", SimulatedDatetime),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, simulated in replaced:
        setattr(module, name, simulated)
    try:
        yield
    finally:
        for (module, name, _), real in zip(replaced, originals, strict=True):
            setattr(module, name, real)
