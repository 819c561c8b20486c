"""What the settings of the pruner change: its rules, shadow mode, audits, constraints."""

from __future__ import annotations

from dataclasses import fields
import math
from typing import Any

import numpy as np
import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import Decision
from optuna_ttp import FastestToTarget
from optuna_ttp import PrunerRules
from optuna_ttp import report
from optuna_ttp import StudyBudget
from optuna_ttp import TrainingLog
from optuna_ttp.search import RunningTrialRules
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import LostProgressRules
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import losses
from tests.studies import make_pruner
from tests.studies import predicted_steps
from tests.studies import SLOW


def _study(**arguments: Any) -> optuna.Study:
    return optuna.create_study(sampler=RandomSampler(seed=0), pruner=make_pruner(**arguments))


def _decision(study: optuna.Study, number: int = -1) -> DecisionRecord:
    decision = decision_of(study.trials[number])
    assert decision is not None
    return decision


def test_what_costs_several_times_the_best_trial_is_skipped() -> None:
    study = _study(max_cost_ratio=2.0)
    first = asked(study, FAST)
    assert not first.should_prune()
    study.tell(first, 1.0)
    slow = asked(study, SLOW)
    assert slow.should_prune()
    assert _decision(study).objection == "cost"
    assert "times what the best trial, number 0, was predicted" in _decision(study).reason
    study.tell(slow, state=TrialState.PRUNED)
    assert not asked(study, {**FAST, "learning_rate": 0.08}).should_prune()


def test_a_smaller_probability_may_be_enough() -> None:
    needed = predicted_steps(SLOW)
    budget = {"max_steps": round(0.9 * needed), "tolerance": 1.0}
    assert asked(_study(**budget), SLOW).should_prune()
    assert not asked(_study(**budget, min_probability=0.2), SLOW).should_prune()
    generous = {"max_steps": round(1.2 * needed), "tolerance": 1.0}
    study = _study(**generous, min_probability=0.95)
    assert asked(study, SLOW).should_prune()
    assert "with a probability of" in _decision(study).reason


def test_what_has_a_fair_chance_runs_until_a_trial_has_completed() -> None:
    """It may be the only one that gets to the target."""
    needed = predicted_steps(SLOW)
    budget = {"max_steps": round(0.9 * needed), "tolerance": 1.0}
    study = _study(**budget, goal=FastestToTarget)
    assert not asked(study, SLOW).should_prune()
    assert asked(study, HOPELESS).should_prune()
    # Where a metric is searched for, misses are no end of the search.
    assert asked(_study(**budget, goal=BestMetric), SLOW).should_prune()
    study.tell(asked(study, FAST), predicted_steps(FAST))
    assert asked(study, {**SLOW, "learning_rate": 0.0301}).should_prune()


def test_shadow_writes_down_and_stops_nothing() -> None:
    study = _study(shadow=True)
    for params in (DIVERGING, HOPELESS, FAST):
        trial = asked(study, params)
        assert not trial.should_prune()
        study.tell(trial, 1.0)
    overrides = [_decision(study, k).override for k in range(3)]
    assert overrides == ["shadow", "shadow", None]
    assert "although predicted to diverge" in _decision(study, 0).reason


def test_an_audit_runs_a_share_of_what_was_to_be_skipped() -> None:
    study = _study(audit=0.3, max_consecutive=1000, seed=1)
    study.tell(asked(study, FAST), 10.0)
    skipped = []
    for _ in range(60):
        trial = asked(study, DIVERGING)
        skipped.append(trial.should_prune())
        study.tell(trial, None if skipped[-1] else 9.0, TrialState.PRUNED if skipped[-1] else None)
    assert 0.55 < np.mean(skipped) < 0.85
    ledger = report(study)
    assert ledger.n_audited == 60 - sum(skipped)
    # The first one that ran is the best of those that did.
    assert ledger.n_wrong == 1
    share, low, high = ledger.wrong_share()
    assert low < share < high
    assert "ran despite their prediction; skipping 1 of them would have been wrong" in str(ledger)


def test_an_audit_tells_skipping_that_is_wrong() -> None:
    study = _study(audit=1.0, max_steps=20, tolerance=1.0)
    study.tell(study.ask(), 0.0)
    for steps in (100.0, 10.0):
        trial = asked(study, SLOW)
        assert not trial.should_prune()
        with TrainingLog(trial) as log:
            for loss in losses(steps, 30):
                log.step(loss)
        study.tell(trial, 1.0)
    assert [r.was_wrong for r in report(study).records] == [None, False, True]


@pytest.mark.skipif(
    not hasattr(optuna.trial.Trial, "set_constraint"), reason="needs Optuna's constraints"
)
def test_a_constraint_says_by_how_much_a_budget_is_exceeded() -> None:
    study = _study(constraint=True, max_steps=20, tolerance=1.0)
    for params in (FAST, SLOW, HOPELESS):
        asked(study, params).should_prune()
    fast, slow, hopeless = (t.constraints["ttp_budget"] for t in study.trials)
    assert fast == pytest.approx(math.log(predicted_steps(FAST) / 20))
    assert fast < 0 < slow < hopeless < math.inf


def test_several_objectives_are_decided_by_asking() -> None:
    pruner = make_pruner(optuna.pruners.MedianPruner())
    study = optuna.create_study(directions=["minimize", "maximize"])
    decisions = [pruner.decide(asked(study, params)) for params in (FAST, DIVERGING)]
    assert [d.prune for d in decisions] == [False, True]
    assert decisions[1].reason.startswith("predicted to diverge")
    assert not decisions[0] and isinstance(decisions[0], Decision)


def test_asking_asks_the_wrapped_pruner_too() -> None:
    pruner = make_pruner(optuna.pruners.ThresholdPruner(upper=5.0))
    study = optuna.create_study(pruner=pruner)
    trial = asked(study, FAST)
    assert not pruner.decide(trial)
    trial.report(9.0, 0)
    assert pruner.decide(trial) == Decision(True, "stopped by ThresholdPruner")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_chance": 1.5}, r"min_chance must be in \[0, 1\] but got 1.5"),
        ({"audit": -0.1}, r"audit must be in \[0, 1\] but got -0.1"),
        ({"min_probability": math.nan}, r"min_probability must be in \[0, 1\] but got nan"),
        ({"half_way": math.nan}, "half_way must be a number but got nan"),
        ({"n_skipped_to_warn": 0}, "n_skipped_to_warn must be at least 1 but got 0"),
        ({"max_cost_ratio": 0.5}, "max_cost_ratio must be finite and at least 1 but got 0.5"),
    ],
)
def test_the_pruner_refuses_what_makes_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pruner(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("not_learned", 0.0),
        ("not_learned", math.nan),
        ("ample", -1.0),
        ("errors", math.nan),
    ],
)
def test_a_rule_for_lost_progress_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must "):
        LostProgressRules(**{name: value})
    with pytest.raises(TypeError, match=f"{name} must be a number but got 'one'"):
        LostProgressRules(**{name: "one"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["earliest", "n_not_finite"])
def test_a_rule_for_running_trials_that_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        RunningTrialRules(**{name: -1})  # type: ignore[arg-type]


def _paying(seconds: float) -> Any:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        trial.set_user_attr("ttp:paid", {"trial": trial.number, "seconds": seconds})
        return 1.0

    return objective


def test_a_trial_that_does_not_fit_into_the_rest_is_skipped() -> None:
    budget = StudyBudget(seconds=1.0)
    study = _study(study_budget=budget)
    study.optimize(_paying(0.97), n_trials=1)
    assert not asked(study, FAST).should_prune()
    assert asked(study, SLOW).should_prune()
    assert _decision(study).objection == "study_budget"


def test_rules_of_rules_reach_what_they_rule() -> None:
    def n_steps(**rules: Any) -> int:
        study = _study(max_steps=100, running_trial=RunningTrialRules(**rules))
        add_observed(study, lambda steps: steps)
        trial = asked(study, FAST)
        with TrainingLog(trial, measure_speed=False) as log:
            for k, loss in enumerate(losses(2000.0, 100)):
                log.step(loss)
                if trial.should_prune():
                    return k
        return 100

    # What is recorded is looked at when it is half as long again.
    assert n_steps() < 60
    assert 60 <= n_steps(earliest=0.6) < 95


@pytest.mark.parametrize("name", [field.name for field in fields(PrunerRules)])
def test_a_rule_of_the_wrong_kind_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a"):
        PrunerRules(**{name: "much"})  # type: ignore[arg-type]
