"""A sampler's memory of a study: its search spaces, their candidates and its trials."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._preference import Evidence
from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import is_multi_objective
from optuna_ttp.study import lost_steps
from optuna_ttp.study import state_of


if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._choice import Resolve
    from optuna_ttp.search._forecast import Forecast
    from optuna_ttp.search._goal import Goal
    from optuna_ttp.study import Configuration


# The largest number of pools that are kept; each set of fixed parameters has its own pool.
_MOST_POOLS = 32

Expected = Callable[["Goal", "SearchPredictor", Candidates], "Forecast"]


class Pool:
    """Candidates of a search space with their last forecast."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self._last: tuple[SearchPredictor, Goal, Forecast] | None = None

    def forecast(self, predictor: SearchPredictor, goal: Goal, expected: Expected) -> Forecast:
        """Return the candidates' forecast; it is kept until the predictor or the goal changes."""
        last = self._last
        if last is None or last[0] is not predictor or last[1] != goal:
            last = predictor, goal, expected(goal, predictor, self.candidates)
            self._last = last
        return last[2]


class _FinishedTrials:
    """The finished trials of a study that were read so far.

    Attributes:
        numbers: The numbers of the trials.
        tried: The configurations of the trials that have one.
        values: Pairs of configuration and value of the trials with both, smaller is better.
    """

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.tried: list[Configuration] = []
        self.values: list[tuple[Configuration, float]] = []

    def add(self, number: int, configuration: Configuration | None, value: float) -> None:
        """Add a trial; a value that is unknown is NaN, and is not kept."""
        self.numbers.add(number)
        if configuration is not None:
            self.tried.append(configuration)
            if not math.isnan(value):
                self.values.append((configuration, value))


class _Memory:
    """One sampler's memory of a study: its search space, its pools and its finished trials."""

    def __init__(self) -> None:
        self.intersection = IntersectionSearchSpace(include_pruned=True)
        self.pools: dict[str, Pool] = {}
        self.finished = _FinishedTrials()


def intersection(study: Study, sampler: BaseSampler) -> dict[str, BaseDistribution]:
    """Return the distributions, by name, that all completed and pruned trials have in common."""
    state = state_of(study)
    with state.lock:
        memory = state.part_of(sampler, _Memory)
        return memory.intersection.calculate(study, use_cache=True)


def pool(
    study: Study, sampler: BaseSampler, key: tuple[Any, ...], make: Callable[[], Candidates]
) -> Pool:
    """Return the pool that is kept under ``key``; at the first call it is made by ``make``."""
    state = state_of(study)
    with state.lock:
        pools = state.part_of(sampler, _Memory).pools
        if repr(key) not in pools:
            if len(pools) >= _MOST_POOLS:
                pools.clear()
            pools[repr(key)] = Pool(make())
        return pools[repr(key)]


def evidence(
    study: Study,
    sampler: BaseSampler,
    trials: Sequence[FrozenTrial],
    resolve: Resolve,
    n_newest_values: int,
) -> tuple[Evidence, int]:
    """Return the evidence of trials, and the number of running trials without hyperparameters.

    The evidence has all tried configurations and the newest ``n_newest_values`` values. Finished
    trials are read once and then remembered with the study.
    """
    running: list[Configuration] = []
    n_undecided = 0
    state = state_of(study)
    with state.lock:
        finished = state.part_of(sampler, _Memory).finished
        for trial in [trial for trial in trials if trial.number not in finished.numbers]:
            configuration = resolve(trial.params) if trial.params else None
            if trial.state != TrialState.RUNNING:
                finished.add(trial.number, configuration, _value(study, trial))
            elif configuration is None:
                n_undecided += 1
            else:
                running.append(configuration)
        tried, newest = [*finished.tried, *running], finished.values[-n_newest_values:]
    seen = Evidence(
        Candidates.resolved(tried),
        Candidates.resolved([configuration for configuration, _ in newest]),
        np.array([value for _, value in newest], dtype=np.float64),
    )
    return seen, n_undecided


def _value(study: Study, trial: FrozenTrial) -> float:
    """Return a finished trial's value, smaller is better; NaN if it is unknown.

    The value of a pruned trial that TTPPruner stopped, or whose last losses were not finite, is
    infinity; with several objectives every value is NaN.
    """
    if is_multi_objective(study):
        return math.nan
    if trial.values:
        maximised = study.directions[0] == StudyDirection.MAXIMIZE
        return -float(trial.values[0]) if maximised else float(trial.values[0])
    if trial.state != TrialState.PRUNED:
        return math.nan
    decision = decision_of(trial)
    is_stopped = decision is not None and decision.action == Action.STOP
    return math.inf if is_stopped or lost_steps(trial) else math.nan
