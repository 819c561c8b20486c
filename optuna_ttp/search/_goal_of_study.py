"""The goal of a study's search, which its sampler and its pruner share."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from optuna_ttp._util.exceptions import GoalWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.search._goal import BestMetric
from optuna_ttp.search._goal import FastestToTarget
from optuna_ttp.search._goal import Goal
from optuna_ttp.study import is_first_warning


if TYPE_CHECKING:
    from optuna import Study

    from optuna_ttp.prediction import SearchPredictor


class GoalOfHalf:
    """The goal that a sampler or a pruner was given, and the goal that it follows in a study.

    Sampler and pruner are the two halves of a search. A half without a goal follows the goal of
    the other half in the same study; if neither has one, both follow ``BestMetric()``.

    Attributes:
        given: The goal that this half was given, or None.
    """

    def __init__(self, goal: Goal | None, predictor: SearchPredictor) -> None:
        if goal is not None:
            if not isinstance(goal, BestMetric | FastestToTarget):
                raise TypeError(f"goal must be a BestMetric or FastestToTarget but got {goal!r}.")
            goal.check(predictor)
        self.given: Goal | None = goal
        self._predictor = predictor

    def in_study(self, study: Study) -> Goal:
        """Return the goal of a study's search, ``BestMetric()`` if neither half was given one.

        Warn once per study if there is no goal, if the two halves have different goals, or if a
        time is to be maximised; raise ValueError if the goal's limits do not fit the predictor.
        """
        halves = (half_inside(study.sampler), half_inside(study.pruner), self)
        goals = [half.given for half in halves if half is not None and half.given is not None]
        goal = self.given if self.given is not None else next(iter(goals), None)
        self._warn(study, goal, goals)
        if goal is None:
            return BestMetric()
        goal.check(self._predictor)
        return goal

    def _warn(self, study: Study, goal: Goal | None, goals: list[Goal]) -> None:
        """Warn of a missing goal, of two different goals, and of a time that is maximised."""
        if goal is None:
            self._warn_of_no_goal(study)
            return
        other = next((one for one in goals if one != goals[0]), None)
        if other is not None and is_first_warning(study, "different goals"):
            warn_caller(
                f"TTPSampler and TTPPruner have different goals: {goals[0]} and {other}. Give "
                "both the same goal, or give it to one of them: the other one then uses it, too.",
                GoalWarning,
            )
        maximised = list(study.directions) == [StudyDirection.MAXIMIZE]
        if goal.is_time and maximised and is_first_warning(study, "direction"):
            warn_caller(
                f"The goal {goal} contradicts the study's direction: a time is never maximised. "
                "If the objective returns the time to the target, create the study with "
                'direction="minimize"; if it returns a metric to be maximised, give the goal '
                "BestMetric(...).",
                GoalWarning,
            )

    def _warn_of_no_goal(self, study: Study) -> None:
        """Warn once per study that the search has no goal, and explain how to give one."""
        if not is_first_warning(study, "no goal"):
            return
        warn_caller(
            "The search has no goal, so trials are compared by the study's own values, up to the "
            f"predictor's horizon of {self._predictor.max_steps:,} steps. Give a goal: goal = "
            "BestMetric(max_epochs=3) if the objective returns a metric, or goal = "
            "FastestToTarget(max_epochs=3) if it returns the time to the target; then "
            "TTPSampler(predictor, goal) and TTPPruner(predictor, goal).",
            GoalWarning,
        )


def half_of(thing: Any) -> GoalOfHalf | None:
    """Return the goal of a TTPSampler or TTPPruner; None for any other object."""
    values = getattr(thing, "__dict__", {}).values()
    return next((value for value in values if isinstance(value, GoalOfHalf)), None)


def half_inside(thing: Any) -> GoalOfHalf | None:
    """Return the goal of the TTPSampler or TTPPruner that an object is or wraps; None if none.

    Samplers and pruners keep the wrapped sampler or pruner in an attribute, so all attributes are
    searched, breadth first, whatever their names are.
    """
    to_search, searched = [thing], set()
    while to_search:
        one = to_search.pop(0)
        searched.add(id(one))
        half = half_of(one)
        if half is not None:
            return half
        values = getattr(one, "__dict__", {}).values()
        wrapped = (value for value in values if isinstance(value, BaseSampler | BasePruner))
        to_search.extend(value for value in wrapped if id(value) not in searched)
    return None
