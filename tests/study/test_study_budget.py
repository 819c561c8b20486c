"""What a whole study may take."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.samplers import RandomSampler
import pytest

from optuna_ttp import StudyBudget
from optuna_ttp import TrainingLog
from tests.studies import asked
from tests.studies import FAST
from tests.studies import losses
from tests.studies import make_pruner


def _study(**arguments: Any) -> optuna.Study:
    return optuna.create_study(sampler=RandomSampler(seed=0), pruner=make_pruner(**arguments))


def _paying(seconds: float) -> Any:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        trial.set_user_attr("ttp:paid", {"trial": trial.number, "seconds": seconds})
        return 1.0

    return objective


@pytest.mark.parametrize(("seconds", "n_trials"), [(3.0, 3), (4.0, 2), (0.5, 20)])
def test_a_study_stops_where_another_trial_is_not_worth_starting(
    seconds: float, n_trials: int
) -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(_paying(seconds), n_trials=50, callbacks=[StudyBudget(seconds=10.0)])
    # Three of three seconds leave one; two of four leave two.
    assert len(study.trials) == n_trials


def test_a_budget_in_steps_counts_what_was_recorded() -> None:
    study = _study()
    budget = StudyBudget(steps=70)
    for _ in range(2):
        trial = asked(study, FAST)
        with TrainingLog(trial) as log:
            for loss in losses(12.0, 20):
                log.step(loss)
        study.tell(trial, 1.0)
    assert budget.left(study.trials) == 30
    assert budget.share_left(study.trials) == pytest.approx(3 / 7)
    assert repr(budget) == "StudyBudget(steps=70)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of seconds and steps must be given but got None and None"),
        ({"seconds": 1.0, "steps": 1}, "Exactly one of seconds and steps must be given"),
        ({"seconds": 0.0}, "seconds must be positive and finite but got 0.0"),
        ({"steps": math.inf}, "steps must be positive and finite but got inf"),
    ],
)
def test_budgets_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyBudget(**arguments)
