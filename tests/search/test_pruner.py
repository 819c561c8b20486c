"""The pruner: its calls, its map, the pruner that it wraps."""

from __future__ import annotations

import math
import pickle
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import HyperparameterMap
from optuna_ttp import TTPPruner
from optuna_ttp.study import decision_of
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import prediction_of
from tests.studies import asked
from tests.studies import decision_on
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import is_skipped
from tests.studies import make_pruner
from tests.studies import make_sampler
from tests.studies import objective
from tests.studies import predicted_seconds
from tests.studies import predicted_steps
from tests.studies import pruned_study
from tests.studies import quick_predictor
from tests.studies import SLOW
from tests.studies import SPACE


class _Asked(BasePruner):
    """Writes down about what it is asked, and says what it is told to say."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, int | None]] = []

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self.asked.append((trial.number, trial.last_step))
        return self.answers.pop(0)


def _budget(name: str, share: float) -> dict[str, Any]:
    """A share of what SLOW takes; an epoch has 24 samples, three batches of eight."""
    steps = predicted_steps(SLOW)
    seconds = float(predicted_seconds([SLOW])[0])
    needed = {"max_steps": steps, "max_epochs": steps / 3, "max_seconds": seconds}
    return {name: share * needed[name]}


def _tight() -> dict[str, Any]:
    return _budget("max_steps", 0.6)


def test_the_decision_is_made_once_and_then_stands() -> None:
    study = pruned_study(**_tight(), max_consecutive=1)
    first = asked(study, SLOW)
    assert first.should_prune()
    attributes = study.trials[0].user_attrs
    second = asked(study, SLOW)
    study.tell(first, state=TrialState.PRUNED)
    # The second one runs, for the first was skipped. What is decided later changes neither.
    assert not second.should_prune()
    study.pruner = make_pruner(**_tight(), max_consecutive=1)
    for step in range(5):
        second.report(1.0, step)
        assert not second.should_prune()
    assert study.trials[0].user_attrs == attributes


def test_another_process_gives_the_same_answer() -> None:
    study = pruned_study(**_tight())
    slow, fast = asked(study, SLOW), asked(study, FAST)
    answers = [slow.should_prune(), fast.should_prune()]
    assert answers == [True, False]
    before = [trial.user_attrs for trial in study.trials]
    study.pruner = pickle.loads(pickle.dumps(study.pruner))
    assert [slow.should_prune(), fast.should_prune()] == answers
    # Even one that would decide otherwise.
    study.pruner = make_pruner(max_steps=1)
    assert [slow.should_prune(), fast.should_prune()] == answers
    assert [trial.user_attrs for trial in study.trials] == before


def test_one_pruner_serves_several_studies() -> None:
    # In memory, all studies and all their first trials have the same ids.
    pruner = make_pruner(**_tight())
    assert is_skipped(pruned_study(pruner), SLOW)
    assert not is_skipped(pruned_study(pruner), FAST)
    assert is_skipped(pruned_study(pruner), DIVERGING)


def test_the_wrapped_pruner_decides_about_trials_that_run() -> None:
    wrapped = _Asked(False, True, False)
    study = pruned_study(make_pruner(wrapped_pruner=wrapped))
    trial = asked(study, FAST)
    assert not trial.should_prune()
    trial.report(1.0, 3)
    assert trial.should_prune() is True
    trial.report(1.0, 4)
    assert trial.should_prune() is False
    assert wrapped.asked == [(0, None), (0, 3), (0, 4)]


def test_the_wrapped_pruner_is_not_asked_about_skipped_trials() -> None:
    wrapped = _Asked()
    study = pruned_study(make_pruner(wrapped_pruner=wrapped))
    trial = asked(study, DIVERGING)
    assert trial.should_prune()
    assert trial.should_prune()
    assert wrapped.asked == []


def test_the_median_pruner_stops_what_it_would_stop_alone() -> None:
    def states(pruner: BasePruner) -> list[tuple[TrialState, int | None]]:
        def climb(trial: optuna.Trial) -> float:
            trial.suggest_float("learning_rate", 0.1, 0.2)
            for step in range(5):
                if trial.should_prune():
                    raise optuna.TrialPruned
                trial.report((5 - step) * (1 + 7 * trial.number % 5), step)
            return float(trial.number)

        mapping = HyperparameterMap(batch_size=8, momentum=0.0)
        if isinstance(pruner, TTPPruner):
            pruner = make_pruner(
                wrapped_pruner=optuna.pruners.MedianPruner(2), hyperparameters=mapping
            )
        study = pruned_study(pruner)
        study.optimize(climb, n_trials=12)
        return [(trial.state, trial.last_step) for trial in study.trials]

    alone = states(optuna.pruners.MedianPruner(2))
    assert states(make_pruner()) == alone
    assert {state for state, _ in alone} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_search_space_without_hyperparameters_runs() -> None:
    study = pruned_study()
    study.optimize(_report_and_ask, n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE
    assert decision_on(study) == (
        "run",
        "no prediction: the hyperparameter map does not apply to this trial",
    )
    assert prediction_of(study.trials[0]) is None


def _report_and_ask(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.report(x, 0)
    if trial.should_prune():
        raise optuna.TrialPruned
    return x


def test_a_trial_for_which_a_function_says_none_runs() -> None:
    mapping = HyperparameterMap(momentum=lambda p: 0.0 if p["learning_rate"] < 1 else None)
    study = pruned_study(hyperparameters=mapping)
    assert is_skipped(study, HOPELESS)
    assert not is_skipped(study, DIVERGING)


def test_a_batch_above_the_number_of_samples_is_a_full_batch() -> None:
    study = pruned_study(hyperparameters=HyperparameterMap(batch_size=4096))
    assert not is_skipped(study, FAST)
    prediction = prediction_of(study.trials[0])
    assert prediction is not None
    assert prediction.batch_size == 24
    assert prediction.steps == float(quick_predictor().estimate(0.1, 24, 0.0).steps)


def test_functions_and_fixed_values_reach_the_prediction() -> None:
    mapping = HyperparameterMap(
        learning_rate="lr", batch_size=lambda p: 2 ** p["log2_batch"], momentum=0.5
    )
    study = pruned_study(hyperparameters=mapping)

    def train(trial: optuna.Trial) -> float:
        trial.suggest_float("lr", 0.1, 0.1)
        trial.suggest_int("log2_batch", 2, 2)
        return float(trial.should_prune())

    study.optimize(train, n_trials=1)
    prediction = prediction_of(study.trials[0])
    assert prediction is not None
    values = list(prediction.configuration)
    assert values == [0.1, 4, 0.5]


@pytest.mark.parametrize(
    "mapping",
    [
        HyperparameterMap(learning_rate="lr"),
        HyperparameterMap(learning_rate="lr", batch_size=8, momentum=0.0),
    ],
)
def test_a_wrong_name_is_an_error(mapping: HyperparameterMap) -> None:
    study = pruned_study(hyperparameters=mapping)
    with pytest.raises(MissingParameterError, match="learning_rate from the parameter 'lr'"):
        study.optimize(objective, n_trials=1)
    with pytest.raises(ValueError, match="learning_rate from the parameter 'lr'"):
        study.optimize(objective, n_trials=1)


def test_asking_before_the_parameters_are_suggested_is_an_error() -> None:
    def too_early(trial: optuna.Trial) -> float:
        trial.suggest_float("learning_rate", 0.1, 0.2)
        return float(trial.should_prune())

    with pytest.raises(MissingParameterError, match=r"only has \['learning_rate'\]"):
        pruned_study().optimize(too_early, n_trials=1)


def _with_optimizer(trial: optuna.Trial) -> float:
    if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
        trial.suggest_float("momentum", 0.0, 0.95)
    trial.suggest_int("batch_size", 1, 24)
    trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)
    if trial.should_prune():
        raise optuna.TrialPruned
    return 0.0


def test_a_trial_in_another_branch_of_a_conditional_space_runs() -> None:
    study = pruned_study()
    study.enqueue_trial({**FAST, "optimizer": "sgd"})
    study.enqueue_trial({**HOPELESS, "optimizer": "adam"})
    study.optimize(_with_optimizer, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert decision_on(study)[1].startswith("no prediction")


def test_a_running_trial_knows_a_parameter_as_well_as_a_finished_one() -> None:
    study = pruned_study()
    assert not asked(study, FAST).should_prune()  # and runs on
    study.enqueue_trial({**HOPELESS, "optimizer": "adam"})
    study.optimize(_with_optimizer, n_trials=1)
    assert study.trials[1].state == TrialState.COMPLETE


@pytest.mark.parametrize("rate", [0.0, -0.1])
def test_a_learning_rate_out_of_range_is_an_error(rate: float) -> None:
    study = pruned_study()
    study.enqueue_trial({**FAST, "learning_rate": rate})
    trial = study.ask({**SPACE, "learning_rate": optuna.distributions.FloatDistribution(-1, 1)})
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        trial.should_prune()


@pytest.mark.parametrize("name", ["shadow", "constraint"])
def test_switches_must_be_booleans(name: str) -> None:
    wrong: Any = "no"
    with pytest.raises(TypeError, match=f"{name} must be a bool but got 'no'"):
        make_pruner(**{name: wrong})
    with pytest.raises(TypeError, match="allow_duplicates must be a bool but got 'no'"):
        make_sampler(allow_duplicates=wrong)


def test_the_pruner_works_without_our_sampler_and_with_it() -> None:
    for sampler in (optuna.samplers.TPESampler(seed=0), make_sampler(goal=BestMetric, seed=0)):
        study = optuna.create_study(sampler=sampler, pruner=make_pruner())
        study.optimize(objective, n_trials=12)
        states = {trial.state for trial in study.trials}
        assert states <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert all(decision_of(trial) is not None for trial in study.trials)


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"], pruner=make_pruner())
    trial = study.ask(SPACE)
    with pytest.raises(ValueError, match="prunes studies with one objective but got 2"):
        study.pruner.prune(study, study.trials[trial.number])


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "max_seconds"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_budget_that_is_not_positive_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive but got {value}"):
        make_pruner(None, goal=BestMetric, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.9}, "tolerance must be finite and at least 1 but got 0.9"),
        ({"tolerance": math.nan}, "tolerance must be finite and at least 1 but got nan"),
        ({"tolerance": math.inf}, "tolerance must be finite and at least 1 but got inf"),
        ({"max_consecutive": 0}, "max_consecutive must be at least 1 but got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pruner(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictor": None}, "predictor must be a TrainingTimePredictor but got NoneType"),
        ({"wrapped_pruner": "median"}, "wrapped_pruner must be a pruner but got 'median'"),
        ({"hyperparameters": {"momentum": 0.9}}, "must be a HyperparameterMap but got {"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TTPPruner(**{"predictor": quick_predictor(), **arguments})
