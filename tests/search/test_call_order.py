"""Wrong orders of calls that an objective can make: each works, or says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
import gc
import math
from typing import Any
import warnings

import optuna
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import CallOrderWarning
from optuna_ttp import HyperparameterMap
from optuna_ttp import learn_from_reports
from optuna_ttp import report
from optuna_ttp import TrainingLog
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp import UnusableCurveWarning
from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import observed_curve
from optuna_ttp.study import prediction_of
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import losses
from tests.studies import make_pruner
from tests.studies import make_sampler
from tests.studies import quick_predictor
from tests.studies import SPACE
from tests.studies import suggest


def _study(with_sampler: bool = True, **arguments: Any) -> optuna.Study:
    sampler = TTPSampler(quick_predictor(), seed=0) if with_sampler else None
    return optuna.create_study(
        sampler=sampler or optuna.samplers.RandomSampler(seed=0), pruner=make_pruner(**arguments)
    )


def _asks_first(trial: optuna.Trial) -> float:
    if trial.should_prune():
        raise optuna.TrialPruned
    return float(suggest(trial)["learning_rate"])


def _run_quietly(study: optuna.Study, objective: Callable[[optuna.Trial], float], n: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.optimize(objective, n_trials=n)


@pytest.mark.parametrize("with_sampler", [False, True])
def test_should_prune_before_the_suggestions_is_named_once(with_sampler: bool) -> None:
    study = _study(with_sampler)
    with pytest.warns(CallOrderWarning, match="should_prune") as caught:
        study.optimize(_asks_first, n_trials=5)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "before the hyperparameters of trial 0 were suggested" in text
    assert "Call trial.should_prune() after the suggestions and before training" in text
    decision = decision_of(study.trials[-1])
    assert decision is not None and decision.action == Action.RUN
    assert "no parameter had been suggested when should_prune() was called" in decision.reason


def test_a_study_without_parameters_is_no_wrong_order() -> None:
    def objective(trial: optuna.Trial) -> float:
        return float(trial.should_prune())

    _run_quietly(_study(), objective, 3)


def test_a_study_with_other_parameters_is_no_wrong_order() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.should_prune()
        return trial.suggest_float("x", 0.0, 1.0)

    _run_quietly(_study(), objective, 3)


def test_asking_again_after_the_suggestions_decides() -> None:
    def objective(trial: optuna.Trial) -> float:
        assert not trial.should_prune()
        if trial.number:
            trial.suggest_categorical("optimizer", ["sgd"])
            assert not trial.should_prune()
        suggest(trial)
        if trial.should_prune():
            raise optuna.TrialPruned
        return 0.0

    study = _study()
    for params in (FAST, DIVERGING, FAST):
        study.enqueue_trial(params)
    _run_quietly(study, objective, 3)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert all(prediction_of(trial) is not None for trial in study.trials)


def test_asking_after_only_some_were_suggested_is_an_error_that_names_the_cure() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("learning_rate", 0.1, 0.2)
        return float(trial.should_prune())

    with pytest.raises(MissingParameterError, match=r"suggest it before should_prune\(\) is call"):
        _study().optimize(objective, n_trials=1)


def test_asking_first_with_a_given_map_is_an_error_that_names_the_cure() -> None:
    study = _study(hyperparameters=HyperparameterMap(learning_rate="lr"))
    with pytest.raises(MissingParameterError, match=r"suggest it before should_prune\(\) is call"):
        study.optimize(_asks_first, n_trials=1)


def test_asking_between_the_suggestions_of_known_parameters_is_named() -> None:
    """Trial 0 has shown the study all names, so that the map may not apply to the next ones."""

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0:
            params = suggest(trial)
            trial.should_prune()
            return float(params["learning_rate"])
        trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)
        trial.should_prune()
        return float(suggest(trial)["learning_rate"])

    study = _study()
    study.enqueue_trial(FAST)
    with pytest.warns(CallOrderWarning, match="before the hyperparameters of trial 1 were sugg"):
        study.optimize(objective, n_trials=4)


def test_reporting_before_the_suggestions_works() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.report(1.0, 0)
        suggest(trial)
        return float(trial.should_prune())

    study = _study()
    study.enqueue_trial(FAST)
    _run_quietly(study, objective, 1)
    assert prediction_of(study.trials[0]) is not None


def test_never_asking_is_named_once() -> None:
    study = _study()
    with pytest.warns(
        CallOrderWarning, match=r"should_prune\(\) was never called in trial 0"
    ) as c:
        study.optimize(lambda trial: float(suggest(trial)["momentum"]), n_trials=3)
    assert len(c) == 1
    assert "raise optuna.TrialPruned" in str(c[0].message)
    # What was to be expected of the trials is written down nevertheless.
    assert all(prediction_of(trial) is not None for trial in study.trials)


def test_never_asking_is_right_without_our_pruner() -> None:
    study = optuna.create_study(sampler=make_sampler(seed=0))
    _run_quietly(study, lambda trial: float(suggest(trial)["momentum"]), 3)


def test_asking_twice_gives_the_same_answer() -> None:
    for params in (FAST, DIVERGING):
        trial = asked(_study(), params)
        assert trial.should_prune() == trial.should_prune() == (params is DIVERGING)


@pytest.mark.parametrize("params", [FAST, DIVERGING], ids=["fast", "diverging"])
def test_asking_after_the_end_gives_what_was_decided_before(params: dict[str, Any]) -> None:
    study = _study()
    trial = asked(study, params)
    before = study.pruner.decide(trial)  # type: ignore[attr-defined]
    study.tell(trial, 1.0)
    assert study.pruner.decide(trial) == before  # type: ignore[attr-defined]
    assert make_pruner().decide(trial) == before
    assert trial.should_prune() is (params is DIVERGING)


def test_asking_for_the_first_time_after_the_end_says_so() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = asked(study, DIVERGING)
    study.tell(trial, 1.0)
    decision = TTPPruner(quick_predictor(), BestMetric()).decide(trial)
    assert not decision
    assert decision.reason == "trial 0 has ended, and nothing was decided before"


def test_asking_with_should_prune_for_the_first_time_after_the_end_stops_nothing() -> None:
    study = _study()
    trial = asked(study, DIVERGING)
    with pytest.warns(CallOrderWarning):
        study.tell(trial, 1.0)
    assert not trial.should_prune()
    assert decision_of(study.trials[0]) is None


def test_asking_after_the_end_of_a_curve_that_broke_down_gives_what_was_decided_before() -> None:
    study = _study()
    trial = asked(study, FAST)
    assert not trial.should_prune()
    with TrainingLog(trial, measure_speed=False) as log:
        for loss in (1.0, 0.9, *[math.nan] * 18):
            log.step(loss)
    study.tell(trial, 1.0)
    assert not trial.should_prune()
    decision = decision_of(study.trials[0])
    assert decision is not None and decision.action == Action.RUN


def test_asking_about_a_trial_of_the_past_is_refused() -> None:
    study = _study()
    study.tell(asked(study, DIVERGING), state=TrialState.PRUNED)
    for wrong in (study.trials[0], optuna.trial.FixedTrial(FAST), 3):
        with pytest.raises(TypeError, match="trial must be the trial of the objective but got"):
            make_pruner().decide(wrong)  # type: ignore[arg-type]


def test_a_log_that_is_opened_before_the_suggestions_is_learned_from() -> None:
    def objective(trial: optuna.Trial) -> float:
        with TrainingLog(trial, measure_speed=False) as log:
            suggest(trial)
            if trial.should_prune():
                raise optuna.TrialPruned
            for loss in losses(12.0, 14):
                log.step(loss)
        return 1.0

    study = _study()
    study.enqueue_trial(FAST)
    _run_quietly(study, objective, 1)
    assert report(study).calibration.n_observed == 1


def test_the_curve_of_a_trial_that_trains_on_after_the_advice_to_stop_is_read() -> None:
    study = _study()
    trial = asked(study, DIVERGING)
    assert trial.should_prune()
    with TrainingLog(trial, measure_speed=False) as log:
        for loss in losses(12.0, 14):
            log.step(loss)
            assert trial.should_prune()
    study.tell(trial, 1.0)
    assert report(study).unusable == {}
    assert observed_curve(study.trials[0]) is not None
    # The pruner goes on to skip: one trial refutes nothing.
    assert asked(study, DIVERGING).should_prune()


def test_a_log_on_a_trial_of_ask_and_tell_is_learned_from() -> None:
    study = _study()
    trial = study.ask(SPACE)
    trial.should_prune()
    log = TrainingLog(trial, measure_speed=False)
    for loss in losses(12.0, 14):
        log.step(loss)
    log.close()
    study.tell(trial, 1.0)
    assert observed_curve(study.trials[0]) is not None


def test_a_log_on_a_finished_trial_says_that_it_comes_late() -> None:
    study = _study()
    trial = asked(study, FAST)
    trial.should_prune()
    study.tell(trial, 1.0)
    log = TrainingLog(trial, measure_speed=False)
    for loss in losses(12.0, 14):
        log.step(loss)
    with pytest.warns(UnusableCurveWarning, match="the trial ended before it was written"):
        log.close()
    del log
    gc.collect()


def test_reports_before_they_are_declared_the_loss_are_learned_from() -> None:
    study = _study()
    trial = asked(study, FAST)
    for step, loss in enumerate(losses(12.0, 14)):
        trial.report(float(loss), step)
    learn_from_reports(trial)
    trial.should_prune()
    study.tell(trial, 1.0)
    assert observed_curve(study.trials[0]) is not None
