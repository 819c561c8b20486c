"""What the sampler proposes, and how it reads a trial's parameters."""

from __future__ import annotations

from collections.abc import Callable
import json
import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState
import pytest

from optuna_ttp import HyperparameterMap
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.search import ForecastRules
from optuna_ttp.search import PreferenceRules
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import prediction_of
from tests.studies import add_observed
from tests.studies import BASES
from tests.studies import FAST
from tests.studies import make_sampler
from tests.studies import mixed_space
from tests.studies import params_of
from tests.studies import predicted_seconds
from tests.studies import predicted_steps
from tests.studies import proposals
from tests.studies import quick_predictor
from tests.studies import quick_sampler
from tests.studies import quick_tpe
from tests.studies import SPACE
from tests.studies import suggest


every_base = pytest.mark.parametrize("base", list(BASES.values()), ids=list(BASES))


redrawn_base = pytest.mark.parametrize(
    "base", [BASES["random"], BASES["tpe"]], ids=["random", "tpe"]
)


def _other_space(trial: optuna.Trial) -> float:
    z = trial.suggest_float("z", -1.0, 1.0)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return z**2 + (kind == "a") + trial.suggest_int("k", 1, 100, log=True) / 100


@every_base
def test_a_space_without_hyperparameters_is_sampled_as_the_base_sampler_does(
    base: Callable[[], BaseSampler],
) -> None:
    n_trials = 14 if base is BASES["gp"] else 22
    ours = params_of(quick_sampler(base()), _other_space, n_trials)
    assert ours == params_of(base(), _other_space, n_trials)


@every_base
@pytest.mark.parametrize("arguments", [{"n_candidates": 1}, {"exploration": 1.0}], ids=str)
def test_with_nothing_to_choose_it_is_the_base_sampler(
    base: Callable[[], BaseSampler], arguments: dict[str, Any]
) -> None:
    n_trials = 12 if base is BASES["gp"] else 16
    ours = params_of(quick_sampler(base(), **arguments), mixed_space, n_trials)
    assert ours == params_of(base(), mixed_space, n_trials)


@pytest.mark.filterwarnings("ignore:Predicted training times were further")
@redrawn_base
def test_predictions_that_do_not_rank_the_trials_leave_the_base_sampler(
    base: Callable[[], BaseSampler],
) -> None:
    def study_of(sampler: BaseSampler) -> optuna.Study:
        study = optuna.create_study(sampler=quick_sampler(RandomSampler(seed=0)))
        add_observed(study, lambda steps: 200.0 / steps)
        study.sampler = sampler
        study.optimize(mixed_space, n_trials=10)
        return study

    ours, plain = study_of(quick_sampler(base())), study_of(base())
    assert [t.params for t in ours.trials] == [t.params for t in plain.trials]


@pytest.mark.parametrize("base", [RandomSampler, quick_tpe], ids=["random", "tpe"])
def test_it_prefers_what_trains_fast(base: Callable[..., BaseSampler]) -> None:
    ours, plain = [], []
    for seed in range(3):
        sampler = quick_sampler(base(seed=seed), n_candidates=8, seed=seed)
        ours.extend(proposals(sampler, 15))
        plain.extend(proposals(base(seed=seed), 15))
    typical = [np.exp(np.log(predicted_seconds(params)).mean()) for params in (ours, plain)]
    assert typical[0] < 0.2 * typical[1]
    # More than half of the plain proposals are hopeless.
    hopeless = [np.mean(predicted_seconds(params) > 1.0) for params in (ours, plain)]
    assert hopeless[0] < 0.85 * hopeless[1]


def test_more_candidates_are_faster_candidates() -> None:
    samplers = [quick_sampler(RandomSampler(seed=1), n_candidates=n) for n in (1, 2, 16)]
    medians = [np.median(predicted_seconds(proposals(s, 30))) for s in samplers]
    assert medians[2] < medians[1] < medians[0]


def test_the_design_comes_before_the_exploration() -> None:
    def proposed(exploration: float) -> list[dict[str, Any]]:
        sampler = quick_sampler(exploration=exploration, search_space=SPACE)
        return params_of(sampler, lambda trial: suggest(trial)["learning_rate"], 12)

    never, often = proposed(0.0), proposed(0.9)
    assert often[:5] == never[:5]
    assert often[5:] != never[5:]


def test_exploration_keeps_proposing_what_is_slow() -> None:
    def share_of_hopeless(exploration: float) -> float:
        arguments = {"exploration": exploration, "search_space": SPACE, "n_candidates": 16}
        proposed = proposals(quick_sampler(RandomSampler(seed=1), **arguments), 40)
        return float(np.mean(predicted_seconds(proposed) > 1.0))

    assert share_of_hopeless(0.0) == 0.0
    assert 0.05 < share_of_hopeless(0.5) < 0.5


def test_a_given_search_space_makes_the_first_trial_a_choice() -> None:
    def first(seed: int, **arguments: Any) -> dict[str, Any]:
        return proposals(quick_sampler(RandomSampler(seed=seed), **arguments), 1)[0]

    given = [first(s, search_space=SPACE, exploration=0.0) for s in range(30)]
    without = [first(s, exploration=0.0) for s in range(30)]
    assert without == [proposals(RandomSampler(seed=s), 1)[0] for s in range(30)]
    assert np.median(predicted_seconds(given)) < 0.3 * np.median(predicted_seconds(without))


@redrawn_base
def test_other_parameters_come_along_as_they_are(base: Callable[[], BaseSampler]) -> None:
    space: dict[str, BaseDistribution] = {
        **SPACE,
        "dropout": FloatDistribution(0.0, 0.5, step=0.1),
        "layers": IntDistribution(1, 64, log=True),
        "width": IntDistribution(16, 64, step=16),
        "scheduler": CategoricalDistribution(["cosine", None, 3, 0.5, True]),
    }
    study = optuna.create_study(sampler=quick_sampler(base()))
    for number in range(30):
        trial = study.ask(space)
        for name, distribution in space.items():
            value = trial.params[name]
            if isinstance(distribution, IntDistribution):
                assert type(value) is int
            elif isinstance(distribution, FloatDistribution):
                assert type(value) is float
            else:
                assert any(value is c for c in ("cosine", None, 3, 0.5, True))
            internal = distribution.to_internal_repr(value)
            assert distribution.to_external_repr(internal) == value
        assert trial.params["width"] in (16, 32, 48, 64)
        assert round(trial.params["dropout"] * 10, 6) in range(6)
        study.tell(trial, float(number % 5))
    assert len({t.params["scheduler"] for t in study.trials}) > 2


def test_single_values_are_respected_and_the_others_chosen() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("momentum", 0.9, 0.9)
        trial.suggest_categorical("batch_size", [8])
        return trial.suggest_float("learning_rate", 1e-5, 0.1, log=True)

    ours = params_of(quick_sampler(RandomSampler(seed=1)), objective, 40)
    plain = params_of(RandomSampler(seed=1), objective, 40)
    assert {(p["momentum"], p["batch_size"]) for p in ours} == {(0.9, 8)}
    # Below the limit of stability, faster is larger.
    rates = [float(np.median([p["learning_rate"] for p in params])) for params in (ours, plain)]
    assert rates[0] > 5 * rates[1]


@pytest.mark.parametrize("fixed", [{"momentum": 0.95}, {"batch_size": 24, "momentum": 0.0}])
def test_the_rest_of_an_enqueued_trial_is_chosen_to_go_with_it(fixed: dict[str, Any]) -> None:
    def seconds(sampler: BaseSampler) -> float:
        study = optuna.create_study(sampler=sampler)
        for _ in range(30):
            study.enqueue_trial(fixed)
        study.optimize(lambda trial: suggest(trial)["momentum"], n_trials=30)
        assert all(fixed.items() <= trial.params.items() for trial in study.trials)
        return float(np.median(predicted_seconds([trial.params for trial in study.trials])))

    ours = seconds(quick_sampler(RandomSampler(seed=1), exploration=0.0))
    assert ours < 0.5 * seconds(RandomSampler(seed=1))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@redrawn_base
@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_the_rest_is_chosen_to_go_with_a_partially_fixed_trial(
    base: Callable[[], BaseSampler], outside: bool
) -> None:
    fixed = {"batch_size": 24}
    if outside:
        ours: BaseSampler = PartialFixedSampler(fixed, quick_sampler(base()))
    else:
        ours = quick_sampler(PartialFixedSampler(fixed, base()))
    params = proposals(ours, 30)
    assert {p["batch_size"] for p in params} == {24}
    plain = proposals(PartialFixedSampler(fixed, base()), 30)
    seconds = [np.median(predicted_seconds(ps)) for ps in (params, plain)]
    assert seconds[0] < 0.7 * seconds[1]


def test_what_is_shared_with_other_workers_is_what_is_proposed() -> None:
    study = optuna.create_study(sampler=quick_sampler(quick_tpe(), exploration=0.0))
    n_shared = 0
    for number in range(20):
        trial = study.ask(SPACE)
        attributes = study.trials[-1].system_attrs
        shared = _shared_params(attributes)
        if number >= 5:
            assert shared == trial.params
            n_shared += 1
        study.tell(trial, float(np.log(trial.params["learning_rate"])))
    assert n_shared == 15


@pytest.mark.parametrize("n_others", [70, 71, 72, 73, 200])
def test_what_is_shared_with_other_workers_may_be_long(n_others: int) -> None:
    # The lengths of the draws differ: around 2,045 characters some need a chunk more than others.
    others = {f"p{i:03}": FloatDistribution(0.0, 1.0) for i in range(n_others)}
    space: dict[str, BaseDistribution] = {**SPACE, **others}
    sampler = quick_sampler(
        quick_tpe(n_startup_trials=2, n_ei_candidates=2), n_design_trials=2, exploration=0.0
    )
    study = optuna.create_study(sampler=sampler)
    lengths = []
    for number in range(8):
        trial = study.ask(space)
        if number >= 2:
            attributes = study.trials[-1].system_attrs
            assert _shared_params(attributes) == trial.params
            lengths.append(len(json.dumps(trial.params)))
        study.tell(trial, float(number))
    assert max(lengths) > 1900


def _shared_params(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """Read as the TPE sampler of another worker does."""
    chunks: list[str] = []
    while chunk := attributes.get(f"tpe:relative_params:{len(chunks)}"):
        chunks.append(chunk)
    assert len(chunks) == sum(key.startswith("tpe:relative_params") for key in attributes)
    assert all(len(chunk) < 2046 for chunk in chunks)
    return json.loads("".join(chunks)) if chunks else None


def test_only_one_branch_of_a_conditional_space_may_have_a_prediction() -> None:
    mapping = HyperparameterMap(
        momentum=lambda p: p["momentum"] if p["optimizer"] == "sgd" else None
    )

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)
        trial.suggest_int("batch_size", 1, 24)
        if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
            trial.suggest_float("momentum", 0.0, 0.95)
        return trial.number % 3

    for base in (RandomSampler(seed=1), quick_tpe(), quick_tpe(group=True)):
        study = optuna.create_study(sampler=quick_sampler(base, hyperparameters=mapping))
        study.optimize(objective, n_trials=15)
        assert {t.params["optimizer"] for t in study.trials} == {"adam", "sgd"}
        for trial in study.trials:
            predicted = prediction_of(trial) is not None
            assert predicted == (trial.params["optimizer"] == "sgd")


def test_a_parameter_that_other_trials_have_is_conditional_and_not_a_wrong_name() -> None:
    study = optuna.create_study(sampler=quick_sampler(RandomSampler(seed=1)))
    study.enqueue_trial({**FAST, "optimizer": "sgd"})

    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
            trial.suggest_float("momentum", 0.0, 0.95)
        trial.suggest_int("batch_size", 1, 24)
        return trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)

    study.optimize(objective, n_trials=10)
    assert len({t.params["optimizer"] for t in study.trials}) == 2
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 10


@pytest.mark.parametrize(
    "mapping",
    [
        HyperparameterMap(learning_rate="lr"),
        HyperparameterMap(learning_rate="lr", batch_size=8, momentum=0.0),
        HyperparameterMap(learning_rate=lambda p: p["lr"]),
    ],
)
def test_a_wrong_name_is_an_error(mapping: HyperparameterMap) -> None:
    study = optuna.create_study(sampler=quick_sampler(hyperparameters=mapping))
    with pytest.raises(MissingParameterError, match="learning_rate from the parameter 'lr'"):
        study.optimize(mixed_space, n_trials=1)


def test_a_trial_pruned_before_it_suggested_all_is_no_error() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_float("learning_rate", 1e-5, 100.0, log=True) > 1e-9:
            raise optuna.TrialPruned
        return 0.0

    study = optuna.create_study(sampler=quick_sampler())
    study.optimize(objective, n_trials=3)
    assert [t.state for t in study.trials] == [TrialState.PRUNED] * 3
    assert all(prediction_of(trial) is None for trial in study.trials)


def test_a_failed_trial_is_no_error_of_the_map() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int("batch_size", 1, 24)
        raise RuntimeError

    study = optuna.create_study(sampler=quick_sampler())
    study.optimize(objective, n_trials=2, catch=(RuntimeError,))
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 2


def test_functions_of_parameters_steer_the_choice() -> None:
    mapping = HyperparameterMap(batch_size=lambda p: 2 ** p["log2_batch"], momentum=0.9)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int("log2_batch", 0, 4)
        return trial.suggest_float("learning_rate", 1e-5, 0.1, log=True)

    ours = params_of(quick_sampler(RandomSampler(seed=1), hyperparameters=mapping), objective, 40)
    plain = params_of(RandomSampler(seed=1), objective, 40)
    rates = [float(np.median([p["learning_rate"] for p in ps])) for ps in (ours, plain)]
    assert rates[0] > 3 * rates[1]


def test_batches_above_the_number_of_samples_are_full_batches() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int("batch_size", 1, 512)
        trial.suggest_float("momentum", 0.0, 0.5)
        return trial.suggest_float("learning_rate", 1e-3, 0.1, log=True)

    study = optuna.create_study(sampler=quick_sampler(RandomSampler(seed=1)))
    study.optimize(objective, n_trials=10)
    for trial in study.trials:
        prediction = prediction_of(trial)
        assert prediction is not None
        assert prediction.batch_size == min(24, trial.params["batch_size"])


def test_without_our_pruner_the_prediction_is_written_down_afterwards() -> None:
    study = optuna.create_study(sampler=quick_sampler())
    study.enqueue_trial(FAST)
    study.optimize(lambda trial: suggest(trial)["momentum"], n_trials=1)
    prediction = prediction_of(study.trials[0])
    assert prediction is not None
    assert prediction.outcome == "converges"
    assert prediction.steps == predicted_steps(FAST)


def test_several_objectives_with_our_pruner_are_refused() -> None:
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=quick_sampler(),
        pruner=TTPPruner(quick_predictor()),
    )
    with pytest.raises(ValueError, match=r"this one has 2 and a TTPPruner\. Use TTPSampler"):
        study.ask()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_candidates": 0}, "n_candidates must be at least 1 but got 0"),
        ({"exploration": -0.1}, r"exploration must be in \[0, 1\] but got -0.1"),
        ({"exploration": 1.1}, r"exploration must be in \[0, 1\] but got 1.1"),
        ({"prior_trials": float("nan")}, "prior_trials must be a number but got nan"),
        ({"least_trust": -1.0}, r"least_trust must be in \[0, 1\] but got -1.0"),
        ({"preference": PreferenceRules(lag=-1.0)}, "lag must not be negative but got -1.0"),
        ({"forecast": ForecastRules(least_sd=math.nan)}, "least_sd must be a number but got nan"),
        ({"largest_grid": -1}, "largest_grid must not be negative but got -1"),
        ({"exploration": float("nan")}, r"exploration must be in \[0, 1\] but got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictor": None}, "predictor must be a TrainingTimePredictor but got NoneType"),
        ({"base_sampler": "tpe"}, "base_sampler must be a sampler but got 'tpe'"),
        ({"base_sampler": TPESampler}, "base_sampler must be a sampler but got <class"),
        ({"hyperparameters": {"learning_rate": "lr"}}, "must be a HyperparameterMap but got {"),
        ({"search_space": {"momentum": (0.0, 0.9)}}, r"to distributions but got \(0.0, 0.9\)"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TTPSampler(**{"predictor": quick_predictor(), **arguments})
