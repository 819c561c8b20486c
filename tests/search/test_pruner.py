from __future__ import annotations

from dataclasses import replace
import math
import pickle
from typing import Any
import warnings

import optuna
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import HyperparameterMap
from optuna_ttp import report
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.study import decision_of
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import prediction_of
from tests.models import small_spectrum
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import losses
from tests.studies import make_pruner
from tests.studies import make_sampler
from tests.studies import objective
from tests.studies import predicted_seconds
from tests.studies import predicted_steps
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


def _pruner(**arguments: Any) -> TTPPruner:
    return make_pruner(**arguments)


def _study(pruner: BasePruner | None = None, **arguments: Any) -> optuna.Study:
    return optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=_pruner(**arguments) if pruner is None else pruner,
    )


def _is_skipped(study: optuna.Study, params: dict[str, Any]) -> bool:
    """Ask about a trial, and let it end as an objective would."""
    trial = asked(study, params)
    skipped = trial.should_prune()
    study.tell(trial, None if skipped else 1.0, TrialState.PRUNED if skipped else None)
    return skipped


def _decision(study: optuna.Study, number: int = -1) -> tuple[str, str]:
    decision = decision_of(study.trials[number])
    assert decision is not None
    return decision.action, decision.reason


@pytest.mark.parametrize(
    ("params", "skipped"), [(FAST, False), (SLOW, False), (HOPELESS, True), (DIVERGING, True)]
)
def test_hopeless_trials_are_skipped_and_others_run(params: dict[str, Any], skipped: bool) -> None:
    study = _study()
    assert _is_skipped(study, params) is skipped
    assert _decision(study)[0] == ("skip" if skipped else "run")


@pytest.mark.parametrize("params", [HOPELESS, DIVERGING])
def test_a_skipped_trial_is_pruned_and_has_not_begun(params: dict[str, Any]) -> None:
    study = _study()
    study.enqueue_trial(params)
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {}
    assert "ttp:curve" not in trial.user_attrs


def test_without_a_budget_the_horizon_of_the_predictor_counts() -> None:
    study = _study()
    assert _is_skipped(study, HOPELESS)
    assert _decision(study) == ("skip", "predicted not to reach the target in 60 steps")
    far = TrainingTimePredictor(small_spectrum(), target_fraction=0.5, max_steps=200_000)
    assert not _is_skipped(_study(TTPPruner(far, BestMetric())), HOPELESS)


def test_a_budget_beyond_the_horizon_counts_instead_of_it() -> None:
    assert _is_skipped(_study(), HOPELESS)
    assert not _is_skipped(_study(max_steps=200_000), HOPELESS)


BUDGETS = ["max_steps", "max_epochs", "max_seconds"]


def _budget(name: str, share: float) -> dict[str, Any]:
    """A share of what SLOW takes; an epoch has 24 samples, three batches of eight."""
    steps = predicted_steps(SLOW)
    seconds = float(predicted_seconds([SLOW])[0])
    needed = {"max_steps": steps, "max_epochs": steps / 3, "max_seconds": seconds}
    return {name: share * needed[name]}


def _tight() -> dict[str, Any]:
    return _budget("max_steps", 0.6)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("share", "skipped"), [(1.1, False), (0.75, False), (0.6, True)])
def test_a_trial_may_take_its_budget_and_half_as_much_again(
    budget: str, share: float, skipped: bool
) -> None:
    assert _is_skipped(_study(**_budget(budget, share)), SLOW) is skipped


@pytest.mark.parametrize("tight", BUDGETS)
def test_the_tightest_of_several_budgets_counts(tight: str) -> None:
    budgets: dict[str, Any] = {}
    for name in BUDGETS:
        budgets |= _budget(name, 0.6 if name == tight else 1.1)
    assert _is_skipped(_study(**budgets), SLOW)


@pytest.mark.parametrize(("tolerance", "skipped"), [(1.0, True), (1.8, True), (2.2, False)])
def test_the_tolerance_can_be_chosen(tolerance: float, skipped: bool) -> None:
    half = _budget("max_steps", 0.5)
    assert _is_skipped(_study(**half, tolerance=tolerance), SLOW) is skipped


def test_the_decision_is_made_once_and_then_stands() -> None:
    study = _study(**_tight(), max_consecutive=1)
    first = asked(study, SLOW)
    assert first.should_prune()
    attributes = study.trials[0].user_attrs
    second = asked(study, SLOW)
    study.tell(first, state=TrialState.PRUNED)
    # The second one runs, for the first was skipped. What is decided later changes neither.
    assert not second.should_prune()
    study.pruner = _pruner(**_tight(), max_consecutive=1)
    for step in range(5):
        second.report(1.0, step)
        assert not second.should_prune()
    assert study.trials[0].user_attrs == attributes


def test_another_process_gives_the_same_answer() -> None:
    study = _study(**_tight())
    slow, fast = asked(study, SLOW), asked(study, FAST)
    answers = [slow.should_prune(), fast.should_prune()]
    assert answers == [True, False]
    before = [trial.user_attrs for trial in study.trials]
    study.pruner = pickle.loads(pickle.dumps(study.pruner))
    assert [slow.should_prune(), fast.should_prune()] == answers
    # Even one that would decide otherwise.
    study.pruner = _pruner(max_steps=1)
    assert [slow.should_prune(), fast.should_prune()] == answers
    assert [trial.user_attrs for trial in study.trials] == before


def test_one_pruner_serves_several_studies() -> None:
    # In memory, all studies and all their first trials have the same ids.
    pruner = _pruner(**_tight())
    assert _is_skipped(_study(pruner), SLOW)
    assert not _is_skipped(_study(pruner), FAST)
    assert _is_skipped(_study(pruner), DIVERGING)


def test_the_wrapped_pruner_decides_about_trials_that_run() -> None:
    wrapped = _Asked(False, True, False)
    study = _study(_pruner(wrapped_pruner=wrapped))
    trial = asked(study, FAST)
    assert not trial.should_prune()
    trial.report(1.0, 3)
    assert trial.should_prune() is True
    trial.report(1.0, 4)
    assert trial.should_prune() is False
    assert wrapped.asked == [(0, None), (0, 3), (0, 4)]


def test_the_wrapped_pruner_is_not_asked_about_skipped_trials() -> None:
    wrapped = _Asked()
    study = _study(_pruner(wrapped_pruner=wrapped))
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
            pruner = _pruner(
                wrapped_pruner=optuna.pruners.MedianPruner(2), hyperparameters=mapping
            )
        study = _study(pruner)
        study.optimize(climb, n_trials=12)
        return [(trial.state, trial.last_step) for trial in study.trials]

    alone = states(optuna.pruners.MedianPruner(2))
    assert states(_pruner()) == alone
    assert {state for state, _ in alone} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_after_so_many_skipped_trials_one_runs() -> None:
    study = _study(max_consecutive=3)
    assert [_is_skipped(study, DIVERGING) for _ in range(8)] == [
        *[True, True, True, False],
        *[True, True, True, False],
    ]
    decision, reason = _decision(study)
    assert decision == "run"
    assert reason.startswith("runs after 3 skipped trials in a row, although predicted to diverge")


def test_while_that_one_runs_no_other_has_to() -> None:
    study = _study(max_consecutive=2)
    assert [_is_skipped(study, DIVERGING) for _ in range(2)] == [True, True]
    running = asked(study, DIVERGING)
    assert not running.should_prune()
    assert [_is_skipped(study, DIVERGING) for _ in range(2)] == [True, True]


def test_a_trial_that_runs_starts_the_count_again() -> None:
    study = _study(max_consecutive=2)
    skipped = [_is_skipped(study, p) for p in (HOPELESS, FAST, HOPELESS, HOPELESS, HOPELESS)]
    assert skipped == [True, False, True, True, False]


def test_a_search_space_without_hyperparameters_runs() -> None:
    study = _study()
    study.optimize(_report_and_ask, n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE
    assert _decision(study) == (
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
    study = _study(hyperparameters=mapping)
    assert _is_skipped(study, HOPELESS)
    assert not _is_skipped(study, DIVERGING)


def test_a_batch_above_the_number_of_samples_is_a_full_batch() -> None:
    study = _study(hyperparameters=HyperparameterMap(batch_size=4096))
    assert not _is_skipped(study, FAST)
    prediction = prediction_of(study.trials[0])
    assert prediction is not None
    assert prediction.batch_size == 24
    assert prediction.steps == float(quick_predictor().estimate(0.1, 24, 0.0).steps)


def test_functions_and_fixed_values_reach_the_prediction() -> None:
    mapping = HyperparameterMap(
        learning_rate="lr", batch_size=lambda p: 2 ** p["log2_batch"], momentum=0.5
    )
    study = _study(hyperparameters=mapping)

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
    study = _study(hyperparameters=mapping)
    with pytest.raises(MissingParameterError, match="learning_rate from the parameter 'lr'"):
        study.optimize(objective, n_trials=1)
    with pytest.raises(ValueError, match="learning_rate from the parameter 'lr'"):
        study.optimize(objective, n_trials=1)


def test_asking_before_the_parameters_are_suggested_is_an_error() -> None:
    def too_early(trial: optuna.Trial) -> float:
        trial.suggest_float("learning_rate", 0.1, 0.2)
        return float(trial.should_prune())

    with pytest.raises(MissingParameterError, match=r"only has \['learning_rate'\]"):
        _study().optimize(too_early, n_trials=1)


def _with_optimizer(trial: optuna.Trial) -> float:
    if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
        trial.suggest_float("momentum", 0.0, 0.95)
    trial.suggest_int("batch_size", 1, 24)
    trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)
    if trial.should_prune():
        raise optuna.TrialPruned
    return 0.0


def test_a_trial_in_another_branch_of_a_conditional_space_runs() -> None:
    study = _study()
    study.enqueue_trial({**FAST, "optimizer": "sgd"})
    study.enqueue_trial({**HOPELESS, "optimizer": "adam"})
    study.optimize(_with_optimizer, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert _decision(study)[1].startswith("no prediction")


def test_a_running_trial_knows_a_parameter_as_well_as_a_finished_one() -> None:
    study = _study()
    assert not asked(study, FAST).should_prune()  # and runs on
    study.enqueue_trial({**HOPELESS, "optimizer": "adam"})
    study.optimize(_with_optimizer, n_trials=1)
    assert study.trials[1].state == TrialState.COMPLETE


@pytest.mark.parametrize("rate", [0.0, -0.1])
def test_a_learning_rate_out_of_range_is_an_error(rate: float) -> None:
    study = _study()
    study.enqueue_trial({**FAST, "learning_rate": rate})
    trial = study.ask({**SPACE, "learning_rate": optuna.distributions.FloatDistribution(-1, 1)})
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        trial.should_prune()


def test_predictions_that_rank_the_trials_wrongly_skip_nothing() -> None:
    study = _study()
    with pytest.warns(
        UnreliablePredictionWarning,
        match=r"a factor [\d.]+\) than those of `c / effective learning rate`.*, 5 trials",
    ):
        add_observed(study, lambda steps: 200.0 / steps)
    assert not _is_skipped(study, DIVERGING)
    decision, reason = _decision(study)
    assert decision == "run"
    assert reason.startswith("predictions are worse than a rule of thumb, although predicted to")
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _is_skipped(study, HOPELESS)


def test_a_search_that_skips_everything_says_that_nothing_was_seen_yet() -> None:
    study = _study()
    for _ in range(10):
        assert _is_skipped(study, DIVERGING)
    with pytest.warns(
        UnreliablePredictionWarning,
        match="All 10 trials so far were skipped, .* runs, although predicted",
    ) as told:
        assert not _is_skipped(study, DIVERGING)
    assert len(told) == 1
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            assert _is_skipped(study, DIVERGING)
        assert not _is_skipped(study, DIVERGING)


def test_a_search_that_has_seen_a_curve_skips_in_silence() -> None:
    study = _study()
    add_observed(study, lambda steps: steps, rates=(0.1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            assert _is_skipped(study, DIVERGING)
        assert not _is_skipped(study, DIVERGING)


@pytest.mark.filterwarnings("ignore:Training begins")
def test_predictions_in_no_order_are_named_as_such() -> None:
    study = _study()
    steps = iter((2.0, 400.0, 3.0, 300.0, 2.0, 500.0, 3.0))
    with pytest.warns(
        UnreliablePredictionWarning, match=r"typically off by a factor [\d.]+ and do not rank"
    ):
        add_observed(study, lambda _: next(steps), (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25))
        assert not _is_skipped(study, DIVERGING)
    assert _decision(study)[1].startswith("predictions are far off and in no order, although")


def _runs(study: optuna.Study, params: dict[str, Any], steps: float) -> bool:
    """Run a trial, if it may, whose curve is at the target after so many steps."""
    trial = asked(study, params)
    if trial.should_prune():
        study.tell(trial, state=TrialState.PRUNED)
        return False
    with TrainingLog(trial) as log:
        for loss in losses(steps, min(math.ceil(1.2 * steps), 60) + 3):
            log.step(loss)
    study.tell(trial, 1.0)
    return True


@pytest.mark.filterwarnings("ignore:All 9 trials")
def test_what_was_to_be_skipped_and_reaches_the_target_is_skipped_no_more() -> None:
    study = _study(max_consecutive=9)
    with pytest.warns(UnreliablePredictionWarning, match="2 of 2 trials that ran") as told:
        ran = [_runs(study, DIVERGING, 30.0) for _ in range(20)]
    # The first one after nine, the second one after three, then all.
    assert ran == [*[False] * 9, True, *[False] * 3, True, *[True] * 6]
    assert len([w for w in told if "2 of 2" in str(w.message)]) == 1
    reason = _decision(study)[1]
    assert reason.startswith("7 of 7 trials that this was predicted for reached the target, ")
    # For another reason it is skipped as ever.
    assert _is_skipped(study, HOPELESS)
    assert report(study).n_wrong == 8


def test_what_was_to_be_skipped_and_misses_the_target_is_skipped_on() -> None:
    study = _study(max_consecutive=4)
    ran = [_runs(study, DIVERGING, 1e5) for _ in range(20)]
    assert ran == [*[False] * 4, True] * 4
    assert report(study).n_wrong == 0


@pytest.mark.parametrize("name", ["shadow", "constraint"])
def test_switches_must_be_booleans(name: str) -> None:
    wrong: Any = "no"
    with pytest.raises(TypeError, match=f"{name} must be a bool but got 'no'"):
        make_pruner(**{name: wrong})
    with pytest.raises(TypeError, match="allow_duplicates must be a bool but got 'no'"):
        make_sampler(allow_duplicates=wrong)


def test_predictions_that_rank_the_trials_keep_skipping_also_when_far_off() -> None:
    study = _study()
    add_observed(study, lambda steps: 1.5 * steps**0.7)
    assert _is_skipped(study, DIVERGING)


@pytest.mark.filterwarnings("ignore:Training begins")
def test_trust_returns_with_agreement() -> None:
    study = _study(max_steps=10_000)
    add_observed(study, lambda steps: 200.0 / steps, rates=(0.1, 0.12, 0.15, 0.2, 0.3))
    with pytest.warns(UnreliablePredictionWarning):
        assert not _is_skipped(study, DIVERGING)
    add_observed(study, lambda steps: 2.0 * steps, rates=(0.1, 0.12, 0.15, 0.2, 0.3) * 3)
    assert _is_skipped(study, DIVERGING)


@pytest.mark.filterwarnings("ignore:Training begins")
def test_what_was_observed_moves_the_limit() -> None:
    study = _study(**_budget("max_steps", 1.0))
    assert not _is_skipped(study, SLOW)
    add_observed(study, lambda steps: 2.0 * steps)
    # Now it takes twice its budget, where half as much again is tolerated.
    assert _is_skipped(study, SLOW)


def test_the_pruner_works_without_our_sampler_and_with_it() -> None:
    for sampler in (optuna.samplers.TPESampler(seed=0), make_sampler(goal=BestMetric, seed=0)):
        study = optuna.create_study(sampler=sampler, pruner=_pruner())
        study.optimize(objective, n_trials=12)
        states = {trial.state for trial in study.trials}
        assert states <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert all(decision_of(trial) is not None for trial in study.trials)


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"], pruner=_pruner())
    trial = study.ask(SPACE)
    with pytest.raises(ValueError, match="prunes studies with one objective but got 2"):
        study.pruner.prune(study, study.trials[trial.number])


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "max_seconds"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_budget_that_is_not_positive_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive but got {value}"):
        _pruner(**{name: value})


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
        _pruner(**arguments)


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


def test_a_budget_in_seconds_needs_the_time_of_a_step() -> None:
    spectrum = replace(small_spectrum(), throughput=None)
    predictor = TrainingTimePredictor(spectrum, target_fraction=0.5, max_steps=60)
    with pytest.raises(ValueError, match=r"measure_speed=False\. Give max_steps or max_epochs"):
        TTPPruner(predictor, BestMetric(max_seconds=10.0))
    study = _study(TTPPruner(predictor, BestMetric(max_epochs=6)))
    assert [_is_skipped(study, SLOW), _is_skipped(study, FAST)] == [True, False]


@pytest.mark.parametrize(("size", "counts_as"), [(20, 20), (40, 40), (100, 48)])
def test_a_batch_has_no_more_samples_than_are_trained_on(size: int, counts_as: int) -> None:
    """Not than the spectrum has, which may be that of a subset."""
    predictor = TrainingTimePredictor(small_spectrum(), target_fraction=0.5, n_samples=48)
    assert predictor.spectrum.n_samples == 24
    study = optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), seed=0), pruner=TTPPruner(predictor)
    )
    study.enqueue_trial({**FAST, "batch_size": size})
    trial = study.ask({**SPACE, "batch_size": IntDistribution(1, 100)})
    trial.should_prune()
    prediction = prediction_of(study.trials[0])
    assert prediction is not None and prediction.batch_size == counts_as
