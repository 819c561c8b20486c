"""The goal of a search, shared by sampler and pruner."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
import inspect
import math
import pickle
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import RandomSampler
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import GoalWarning
from optuna_ttp import StudyBudget
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.search import Goal
from optuna_ttp.study import prediction_of
from tests.studies import asked
from tests.studies import FAST
from tests.studies import quick_predictor


def _is_limited_to(study: optuna.Study, max_steps: float) -> bool:
    """Whether the pruner of a study has the goal with this limit."""
    asked(study, FAST).should_prune()
    prediction = prediction_of(study.trials[-1])
    assert prediction is not None
    return bool(prediction.budget_steps == max_steps)


def _study(
    sampler: BaseSampler | None, pruner: BasePruner | None, direction: Any = "minimize"
) -> optuna.Study:
    return optuna.create_study(
        direction=direction,
        sampler=RandomSampler(seed=0) if sampler is None else sampler,
        pruner=pruner,
    )


@pytest.mark.parametrize("kind", [BestMetric, FastestToTarget])
def test_a_goal_is_a_value(kind: type[Goal]) -> None:
    goal = kind(max_epochs=3, study_budget=StudyBudget(seconds=60))
    assert goal == pickle.loads(pickle.dumps(goal))
    assert goal == kind(max_epochs=3, study_budget=StudyBudget(seconds=60.0))
    assert goal != kind(max_epochs=4) and len({goal, kind()}) == 2
    assert repr(goal) == f"{kind.__name__}(max_epochs=3, study_budget=StudyBudget(seconds=60))"
    with pytest.raises(FrozenInstanceError):
        goal.max_epochs = 4  # type: ignore[misc]


def test_goals_of_two_kinds_differ() -> None:
    assert BestMetric() != FastestToTarget()  # type: ignore[comparison-overlap]


def test_the_smallest_limit_counts() -> None:
    predictor = quick_predictor()
    batch_sizes = np.array([4, 24])
    # Six steps and one step are an epoch of 24 samples.
    assert FastestToTarget().steps(predictor, batch_sizes).tolist() == [math.inf, math.inf]
    both = BestMetric(max_steps=10, max_epochs=2).steps(predictor, batch_sizes)
    assert both.tolist() == [10.0, 2.0]
    second = BestMetric(max_steps=10, max_epochs=2, max_seconds=1e-9)
    assert (second.steps(predictor, batch_sizes) < 1.0).all()


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "max_seconds"])
@pytest.mark.parametrize("kind", [BestMetric, FastestToTarget])
def test_a_limit_must_be_a_positive_number(kind: type[Goal], name: str) -> None:
    for value in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be positive but got {value}"):
            kind(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"{name} must be a number but got '3'"):
        kind(**{name: "3"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} must not be too large for a float but got 1000"):
        kind(**{name: 10**400})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="study_budget must be a StudyBudget but got 60"):
        kind(study_budget=60)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [TTPSampler, TTPPruner])
def test_something_else_is_refused(half: Any) -> None:
    with pytest.raises(TypeError, match="goal must be a BestMetric or FastestToTarget but got 't"):
        half(quick_predictor(), "time")
    # What both goals share does not say which of them is meant.
    with pytest.raises(TypeError, match="goal must be a BestMetric or FastestToTarget but got Go"):
        half(quick_predictor(), Goal(max_steps=3))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_pruner_takes_over_the_goal_of_the_sampler(wrapped: bool) -> None:
    sampler: BaseSampler = TTPSampler(quick_predictor(), BestMetric(max_steps=33), seed=0)
    if wrapped:
        sampler = PartialFixedSampler({"momentum": 0.0}, sampler)
    assert _is_limited_to(_study(sampler, TTPPruner(quick_predictor())), 33)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_sampler_takes_over_the_goal_of_the_pruner(wrapped: bool) -> None:
    pruner: BasePruner = TTPPruner(quick_predictor(), FastestToTarget(max_steps=33))
    if wrapped:
        pruner = optuna.pruners.PatientPruner(pruner, patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = _study(TTPSampler(quick_predictor(), seed=0), pruner)
        trial = asked(study, FAST)
        trial.should_prune()
        study.tell(trial, 1.0)


def _warned(study: optuna.Study, match: str) -> str:
    """The one warning that a study gives of its goal."""
    with pytest.warns(GoalWarning, match=match) as caught:
        for _ in range(3):
            trial = asked(study, FAST)
            trial.should_prune()
            study.tell(trial, 1.0)
    assert len(caught) == 1
    return str(caught[0].message)


@pytest.mark.parametrize("halves", ["sampler", "pruner", "both"])
def test_a_search_without_a_goal_says_so_once(halves: str) -> None:
    sampler = TTPSampler(quick_predictor(), seed=0) if halves != "pruner" else None
    pruner = TTPPruner(quick_predictor()) if halves != "sampler" else None
    study = _study(sampler, pruner, "maximize")
    text = _warned(study, "The search has no goal, so trials are compared by the study's own")
    assert "goal = BestMetric(max_epochs=3)" in text and "TTPSampler(predictor, goal)" in text


def test_different_goals_are_named() -> None:
    study = _study(
        TTPSampler(quick_predictor(), BestMetric(max_epochs=3), seed=0),
        TTPPruner(quick_predictor(), BestMetric(max_epochs=30)),
    )
    text = _warned(study, r"different goals: BestMetric\(max_epochs=3\) and BestMetric\(max_ep")
    assert "Give both the same goal" in text


@pytest.mark.parametrize("halves", ["sampler", "pruner", "both"])
def test_a_time_is_never_maximised(halves: str) -> None:
    goal = FastestToTarget()
    sampler = TTPSampler(quick_predictor(), goal, seed=0) if halves != "pruner" else None
    pruner = TTPPruner(quick_predictor(), goal) if halves != "sampler" else None
    text = _warned(_study(sampler, pruner, "maximize"), "a time is never maximised")
    assert "contradicts the study's direction" in text and 'direction="minimize"' in text


def test_one_goal_in_its_direction_is_met_with_silence() -> None:
    for direction, goal in (("minimize", FastestToTarget()), ("maximize", BestMetric())):
        for given in ((goal, goal), (goal, None), (None, goal)):
            study = _study(
                TTPSampler(quick_predictor(), given[0], seed=0),
                TTPPruner(quick_predictor(), given[1]),
                direction,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                trial = asked(study, FAST)
                assert not trial.should_prune()
                study.tell(trial, 1.0)


def test_every_study_is_warned() -> None:
    sampler, pruner = TTPSampler(quick_predictor(), seed=0), TTPPruner(quick_predictor())
    for _ in range(2):
        _warned(_study(sampler, pruner), "The search has no goal")


def test_a_decision_outside_of_the_pruners_study_needs_a_goal_too() -> None:
    pruner = TTPPruner(quick_predictor())
    with pytest.warns(GoalWarning, match="The search has no goal"):
        pruner.decide(asked(_study(None, None), FAST))


def test_different_goals_are_named_in_the_order_of_their_halves() -> None:
    study = _study(TTPSampler(quick_predictor(), FastestToTarget(), seed=0), None)
    pruner = TTPPruner(quick_predictor(), BestMetric(max_epochs=3))
    with pytest.warns(GoalWarning, match=r"FastestToTarget\(\) and BestMetric\(max_epochs=3\)"):
        pruner.decide(asked(study, FAST))


@pytest.mark.parametrize("half", [TTPSampler, TTPPruner])
def test_a_half_takes_no_more_than_eight_arguments(half: Any) -> None:
    assert len(inspect.signature(half).parameters) <= 8
