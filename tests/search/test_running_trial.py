"""The pruner while a trial runs: what a trial's own curve says of its chances."""

from __future__ import annotations

from dataclasses import replace
import math
import time
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import learn_from_reports
from optuna_ttp import report
from optuna_ttp import TrainingLog
from optuna_ttp import TTPPruner
from optuna_ttp import UnusableCurveWarning
from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import observed_steps
from optuna_ttp.study import record_of
from optuna_ttp.study._attributes import RECORD
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import losses
from tests.studies import make_pruner
from tests.studies import make_sampler
from tests.studies import quick_predictor
from tests.studies import SLOW
from tests.studies import SPACE


def _study(**arguments: Any) -> optuna.Study:
    return optuna.create_study(sampler=RandomSampler(seed=0), pruner=make_pruner(**arguments))


def _decision(study: optuna.Study, number: int = -1) -> DecisionRecord:
    decision = decision_of(study.trials[number])
    assert decision is not None
    return decision


def _train(trial: optuna.Trial, steps_to_target: float, n_steps: int) -> int:
    """Train until told to stop; return how many steps it took."""
    return _follow(trial, losses(steps_to_target, n_steps))


def _follow(trial: optuna.Trial, curve: NDArray[np.float64]) -> int:
    with TrainingLog(trial, measure_speed=False) as log:
        for k, loss in enumerate(curve):
            log.step(loss)
            if trial.should_prune():
                return k + 1
    return len(curve)


def _lost_progress(n_steps: int, recovers: bool = False) -> NDArray[np.float64]:
    """A loss that is halved in twelve steps, and back where it was soon after."""
    initial = quick_predictor().initial_loss
    curve = np.full(n_steps, 1.02 * initial)
    curve[:10] = losses(12.0, 10)
    if recovers:
        curve[14:] = losses(12.0, n_steps - 14)
    return curve


def test_a_trial_that_will_miss_its_budget_is_stopped_by_its_curve() -> None:
    study = _study(max_steps=100)
    add_observed(study, lambda steps: steps)
    trial = asked(study, FAST)
    assert _train(trial, 2000.0, 100) < 100
    decision = _decision(study)
    assert (decision.action, decision.objection) == ("stop", "chance")
    assert "its chance to reach the target within its budget of 100 steps is" in decision.reason
    # It stands.
    assert trial.should_prune()
    study.tell(trial, state=TrialState.PRUNED)
    ledger = report(study)
    assert ledger.n_stopped == 1
    assert ledger.skipped_by_kind == {"chance": 1}
    assert 0 < ledger.records[-1].avoided_seconds < 100 * 0.002
    assert "1 stopped while they ran" in str(ledger)


def test_the_first_steps_stop_nothing() -> None:
    study = _study(max_steps=200, tolerance=20.0)
    add_observed(study, lambda steps: steps)
    # Predicted to miss its budget by a factor of two, which the tolerance lets pass.
    trial = asked(study, {**FAST, "learning_rate": 0.003})
    assert not trial.should_prune()
    # A fifth is 40 steps, and what is recorded is looked at when it is half as long again.
    assert 40 <= _train(trial, 400.0, 200) < 60


def test_where_no_trial_has_completed_none_is_stopped_for_the_target() -> None:
    def steps(goal: Any) -> int:
        study = _study(max_steps=100, goal=goal)
        for k in range(3):
            trial = asked(study, {**FAST, "learning_rate": 0.1 + 0.02 * k})
            with TrainingLog(trial, measure_speed=False) as log:
                for loss in losses(12.0, 12):
                    log.step(loss)
            trial.should_prune()
            study.tell(trial, state=TrialState.PRUNED)
        return _train(asked(study, FAST), 2000.0, 100)

    assert steps(FastestToTarget) < 100
    assert steps(BestMetric) == 100


def test_a_trial_that_gets_as_far_as_the_best_runs_although_it_misses_the_target() -> None:
    def decided(goal: Any, depth: float) -> tuple[bool, str]:
        """Whether SLOW is skipped, after a trial that completed after a share of its way."""
        study = _study(max_steps=16, goal=goal)
        trial = asked(study, FAST)
        with TrainingLog(trial, measure_speed=False) as log:
            for loss in losses(12.0, 1 + round(12.0 * depth)):
                log.step(loss)
        study.tell(trial, 1.0)
        skipped = asked(study, SLOW).should_prune()
        return skipped, _decision(study).reason

    # It needs about 40 steps, and 24 are what it may take with the tolerance.
    assert not decided(BestMetric, 0.3)[0]
    for goal, depth in ((BestMetric, 0.95), (FastestToTarget, 0.3)):
        skipped, reason = decided(goal, depth)
        assert skipped
        assert "predicted to miss the target by far" in reason


def test_a_loss_that_is_another_one_is_no_measure_for_the_others() -> None:
    study = _study(max_steps=16)
    trial = asked(study, FAST)
    with TrainingLog(trial, measure_speed=False) as log:
        for loss in losses(30.0, 10):
            log.step(8.0 * float(loss))
    study.tell(trial, 1.0)
    with pytest.warns(UnusableCurveWarning, match="a sum over the batch of 8"):
        assert asked(study, SLOW).should_prune()


def test_a_trial_that_cannot_get_as_far_as_the_best_is_stopped() -> None:
    study = _study(max_steps=100)
    for rate in (0.08, 0.1, 0.12):
        trial = asked(study, {**FAST, "learning_rate": rate})
        assert not trial.should_prune()
        with TrainingLog(trial, measure_speed=False) as log:
            for loss in losses(12.0, 9):
                log.step(loss)
        study.tell(trial, rate)
    assert _train(asked(study, {**FAST, "learning_rate": 0.11}), 1e4, 100) < 100
    assert "its chance to get as far as the best trials within" in _decision(study).reason


def test_a_trial_that_has_spent_its_budget_is_left_to_end() -> None:
    study = _study(max_steps=100)
    add_observed(study, lambda steps: steps)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    # Nobody asks before the last step, and it has not reached the target.
    with TrainingLog(trial, measure_speed=False) as log:
        for loss in losses(2000.0, 100):
            log.step(loss)
        assert not trial.should_prune()
        for loss in losses(2000.0, 160)[100:]:
            log.step(loss)
        assert trial.should_prune()


def test_a_trial_that_makes_it_is_not_stopped() -> None:
    study = _study(max_steps=100)
    add_observed(study, lambda steps: steps)
    assert _train(asked(study, FAST), 80.0, 90) == 90


def test_one_that_is_slower_than_the_best_is_stopped_where_time_is_the_goal() -> None:
    def steps(goal: Any) -> int:
        study = _study(max_steps=2000, goal=goal)
        add_observed(study, lambda steps: steps)
        return _train(asked(study, FAST), 400.0, 450)

    assert steps(FastestToTarget) < 100
    assert steps(BestMetric) == 450


def test_it_can_be_turned_off_and_does_nothing_in_the_shadow() -> None:
    for arguments in ({"min_chance": 0.0}, {"shadow": True}):
        study = _study(max_steps=100, **arguments)
        add_observed(study, lambda steps: steps)
        assert _train(asked(study, FAST), 2000.0, 100) == 100
    assert _decision(study).override == "shadow"


@pytest.mark.parametrize("goal", [BestMetric, FastestToTarget])
def test_a_trial_whose_loss_returned_to_its_start_is_stopped(goal: Any) -> None:
    study = _study(max_steps=200, goal=goal)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    # No trial has completed: this does not depend on what others got to.
    assert 40 <= _follow(trial, _lost_progress(200)) < 100
    decision = _decision(study)
    assert (decision.action, decision.objection) == ("stop", "chance")
    assert "its training loss is back where it began" in decision.reason
    assert decision.seconds_left > 0


def test_one_that_recovers_and_one_that_comes_down_slowly_are_not() -> None:
    for curve in (_lost_progress(200, recovers=True), losses(2000.0, 200)):
        study = _study(max_steps=200)
        assert _follow(asked(study, FAST), curve) == 200


def test_a_curve_is_followed_however_few_of_its_steps_are_logged() -> None:
    study = _study(max_steps=1000)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    curve = losses(12.0, 1000)
    curve[100:] = math.nan
    with TrainingLog(trial, measure_speed=False) as log:
        for step in range(0, 1000, 50):
            log.step(curve[step], step)
            if trial.should_prune():
                break
    assert step < 600


def test_a_warm_up_is_not_taken_for_a_set_back() -> None:
    rng = np.random.default_rng(0)
    curve = quick_predictor().initial_loss * rng.normal(1.0, 0.1, 200)
    study = _study(max_steps=200)
    assert _follow(asked(study, FAST), curve) == 200


def test_a_loss_that_stays_infinite_stops_a_trial() -> None:
    study = _study(max_steps=200)
    curve = losses(12.0, 200)
    curve[20:] = math.nan
    trial = asked(study, FAST)
    assert not trial.should_prune()
    assert 20 < _follow(trial, curve) < 40
    assert "its training loss has been infinite or NaN for" in _decision(study).reason


@pytest.mark.parametrize("reports", [False, True])
def test_one_whose_loss_never_was_finite_is_stopped(reports: bool) -> None:
    study = _study(max_steps=200)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    if not reports:
        assert _follow(trial, np.full(200, math.nan)) < 20
        return
    learn_from_reports(trial)
    for k in range(20):
        trial.report(math.nan, k)
        if trial.should_prune():
            break
    assert k < 5


def test_a_batch_that_overflows_stops_nothing() -> None:
    curve = losses(60.0, 80)
    # What is recorded is written down after these steps.
    for k in (0, 7, 15, 31, 63):
        curve[k] = math.inf
    study = _study(max_steps=200)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    assert _follow(trial, curve) == 80


def _after_a_fast_one(steps: int, **arguments: Any) -> optuna.Study:
    """A study for a time whose first trial has reached the target after so many steps."""
    study = _study(max_steps=200, goal=FastestToTarget, **arguments)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    assert _follow(trial, losses(float(steps), steps + 2)) == steps + 2
    study.tell(trial, float(steps))
    return study


@pytest.mark.parametrize("params", [DIVERGING, HOPELESS], ids=["diverging", "hopeless"])
def test_what_runs_because_it_is_its_turn_ends_when_it_cannot_win(params: Any) -> None:
    study = _after_a_fast_one(12, max_consecutive=1)
    assert asked(study, params).should_prune()
    trial = asked(study, params)
    assert not trial.should_prune()
    kind = _decision(study).objection
    assert 12 <= _train(trial, 1e5, 200) < 40
    decision = _decision(study)
    assert decision.reason.startswith("after ")
    assert "it can no longer be faster than trial 0, the fastest (" in decision.reason
    assert (decision.action, decision.override) == ("stop", "turn")
    # What it ran in spite of is still known.
    assert decision.objection == kind


def test_what_runs_to_audit_the_predictions_runs_to_its_end() -> None:
    study = _after_a_fast_one(12, audit=1.0)
    trial = asked(study, HOPELESS)
    assert not trial.should_prune()
    assert _train(trial, 1e5, 150) == 150


def test_what_is_faster_is_a_question_of_seconds_as_they_were_measured() -> None:
    def n_steps(seconds: float) -> int:
        """Steps of a trial whose steps take so many seconds, after one of 0.01 s a step."""
        study = _study(max_steps=400, goal=FastestToTarget, max_consecutive=1)
        for k, seconds_per_step in enumerate((0.01, seconds)):
            trial = asked(study, DIVERGING if k else FAST)
            if trial.should_prune():
                # The next one's turn has come, whatever is predicted.
                study.tell(trial, state=TrialState.PRUNED)
                trial = asked(study, DIVERGING)
                assert not trial.should_prune()
            with TrainingLog(trial) as log, mock.patch.object(time, "perf_counter") as clock:
                for step, loss in enumerate(losses(1e5 if k else 30.0, 32 + 100 * k)):
                    clock.return_value = step * seconds_per_step
                    log.step(loss)
                    if trial.should_prune():
                        break
            study.tell(trial, seconds_per_step * (step + 1))
        return step + 1

    # As many seconds as the first one took are 30 and 300 of its steps.
    assert 30 <= n_steps(0.01) < 60
    assert n_steps(0.001) == 132


def test_a_trial_that_stopped_at_its_target_is_as_fast_as_it_was() -> None:
    # The smoothed loss of noisy batches lags behind what the objective measured.
    curve = losses(33.0, 31)
    curve[2:] *= np.resize([1.6, 0.7], 29)
    study = _study(max_steps=200, goal=FastestToTarget)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    assert _follow(trial, curve) == 31
    study.tell(trial, 31.0)
    assert math.isinf(observed_steps(study.trials[0], quick_predictor()))
    slower = asked(study, {**FAST, "learning_rate": 0.09})
    assert not slower.should_prune()
    assert _train(slower, 100.0, 200) < 60


def test_one_that_ended_short_of_its_target_is_no_measure() -> None:
    study = _study(max_steps=200, goal=FastestToTarget)
    trial = asked(study, FAST)
    assert not trial.should_prune()
    assert _follow(trial, losses(37.0, 30)) == 30
    study.tell(trial, 1e9)
    slower = asked(study, {**FAST, "learning_rate": 0.09})
    assert not slower.should_prune()
    assert _train(slower, 100.0, 110) == 110


def test_a_trial_that_was_stopped_counts_as_a_bad_one() -> None:
    def next_rates(action: Action) -> list[float]:
        """What is proposed after our pruner stopped trials of large learning rates, or not."""
        sampler = make_sampler(goal=BestMetric, search_space=SPACE, max_steps=200, seed=0)
        pruner = TTPPruner(quick_predictor())
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        for k in range(12):
            large = bool(k % 2)
            rate = (0.2 if large else 0.05) * (1.0 + 0.02 * k)
            trial = asked(study, {**FAST, "learning_rate": rate})
            assert not trial.should_prune()
            record = record_of(study.trials[-1])
            assert record is not None
            written = replace(record, decision=DecisionRecord(action, ""))
            trial.set_user_attr(RECORD, written.to_json())
            study.tell(trial, None if large else 1.0 + 0.01 * k, TrialState(2 if large else 1))
        return [study.ask(SPACE).params["learning_rate"] for _ in range(10)]

    assert np.median(next_rates(Action.STOP)) < 0.7 * np.median(next_rates(Action.RUN))
