"""Sampler and pruner together with everything that Optuna brings along."""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import multiprocessing
from pathlib import Path
import pickle
import time
from typing import Any

import optuna
from optuna import pruners
from optuna import samplers
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import CallOrderWarning
from optuna_ttp import FastestToTarget
from optuna_ttp import HyperparameterMap
from optuna_ttp import report
from optuna_ttp import SamplerRules
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study import decision_of
from optuna_ttp.study import observed_curve
from optuna_ttp.study import paid_seconds
from optuna_ttp.study import prediction_of
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import objective
from tests.studies import quick_predictor
from tests.studies import QuickGPSampler
from tests.studies import SLOW
from tests.studies import SPACE
from tests.studies import storage
from tests.studies import STORAGES
from tests.studies import suggest
from tests.studies import work


PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "nop": pruners.NopPruner,
    "median": lambda: pruners.MedianPruner(n_startup_trials=2),
    "percentile": lambda: pruners.PercentilePruner(25.0, n_startup_trials=2),
    "successive-halving": lambda: pruners.SuccessiveHalvingPruner(reduction_factor=2),
    "hyperband": lambda: pruners.HyperbandPruner(max_resource=6, reduction_factor=2),
    "threshold": lambda: pruners.ThresholdPruner(lower=0.3),
    "patient": lambda: pruners.PatientPruner(pruners.MedianPruner(n_startup_trials=2), patience=1),
    "wilcoxon": lambda: pruners.WilcoxonPruner(p_threshold=0.4),
}
BASES: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: samplers.RandomSampler(seed=0),
    "tpe": lambda: samplers.TPESampler(seed=0, n_startup_trials=4),
    "gp": lambda: QuickGPSampler(seed=0, n_startup_trials=6),
    "qmc": lambda: samplers.QMCSampler(seed=0, warn_independent_sampling=False),
    "nsgaii": lambda: samplers.NSGAIISampler(seed=0, population_size=4),
    "nsgaiii": lambda: samplers.NSGAIIISampler(seed=0, population_size=4),
}


def _study(
    base: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    **arguments: Any,
) -> optuna.Study:
    predictor = quick_predictor()
    return optuna.create_study(
        sampler=TTPSampler(
            predictor, BestMetric(), base, seed=0, rules=SamplerRules(n_candidates=3)
        ),
        pruner=TTPPruner(predictor) if pruner is None else pruner,
        **arguments,
    )


def _check(trials: list[FrozenTrial], n_trials: int) -> None:
    """Every trial is either trained or pruned, and the ledger has a line for it."""
    assert len(trials) == n_trials
    for trial in trials:
        assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        assert prediction_of(trial) is not None
        assert paid_seconds(trial) >= 0.0
        json.dumps(trial.user_attrs, allow_nan=False)
        decision = decision_of(trial)
        if decision is not None:
            skipped = decision.action == "skip"
            assert skipped == (observed_curve(trial) is None)
            assert skipped <= (trial.state == TrialState.PRUNED)


@pytest.mark.parametrize("pruner", list(PRUNERS.values()), ids=list(PRUNERS))
def test_every_pruner_of_optuna_can_be_wrapped(pruner: Callable[[], BasePruner]) -> None:
    wrapped = TTPPruner(quick_predictor(), BestMetric(), pruner())
    study = _study(samplers.RandomSampler(seed=0), pruner=wrapped)
    study.enqueue_trial(DIVERGING)
    # The threshold stops what is fast, which is what is proposed first.
    study.optimize(objective, n_trials=24)
    _check(study.trials, 24)
    assert study.trials[0].state == TrialState.PRUNED
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) >= 2


@pytest.mark.filterwarnings("ignore:Predicted training times were further")
@pytest.mark.parametrize("pruner", list(PRUNERS.values()), ids=list(PRUNERS))
def test_the_sampler_works_under_every_pruner_of_optuna(pruner: Callable[[], BasePruner]) -> None:
    # Under Hyperband, samplers are given a part of the study with fewer attributes.
    study = _study(BASES["tpe"](), pruner=pruner())
    study.optimize(objective, n_trials=8)
    _check(study.trials, 8)


@pytest.mark.parametrize("kind", STORAGES)
def test_every_storage_of_optuna_will_do(kind: str) -> None:
    with storage(kind) as store:
        study = _study(samplers.TPESampler(seed=0, n_startup_trials=3), storage=store)
        study.enqueue_trial(DIVERGING)
        study.enqueue_trial(FAST)
        study.optimize(objective, n_trials=6)
        # What another process would see.
        loaded = optuna.load_study(study_name=study.study_name, storage=store)
        _check(loaded.trials, 6)
        assert [trial.state.name for trial in loaded.trials[:2]] == ["PRUNED", "COMPLETE"]
        assert report(loaded).n_skipped >= 1
        assert str(report(loaded)) == str(report(study))


@pytest.mark.parametrize("kind", ["inmemory", "cached_sqlite"])
def test_several_threads_share_sampler_and_pruner(kind: str) -> None:
    with storage(kind) as store:
        study = _study(samplers.TPESampler(seed=0, n_startup_trials=4), storage=store)
        study.optimize(objective, n_trials=8, n_jobs=2)
        _check(study.trials, 8)


@pytest.mark.slow
def test_several_processes_share_a_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    name = optuna.create_study(storage=url).study_name
    study = optuna.load_study(study_name=name, storage=url)
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=work, args=(url, name, 0, 5))
    worker.start()
    while worker.is_alive() and not study.trials:
        time.sleep(0.05)
    # The other one has begun; from here on both are at work.
    work(url, name, 1, 3)
    worker.join(timeout=300)
    assert worker.exitcode == 0
    _check(study.trials, 8)
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 8


def test_ask_and_tell() -> None:
    study = _study()
    for _ in range(6):
        trial = study.ask(SPACE)
        skipped = trial.should_prune()
        assert trial.should_prune() == skipped
        study.tell(trial, None if skipped else 1.0, TrialState.PRUNED if skipped else None)
    assert all(decision_of(trial) is not None for trial in study.trials)
    assert all(paid_seconds(trial) >= 0.0 for trial in study.trials)


def test_ask_and_tell_by_number_in_another_process() -> None:
    with storage("sqlite") as store:
        study = _study(storage=store)
        number = asked(study, FAST).number
        with pytest.warns(CallOrderWarning, match="was never called in trial 0"):
            study.tell(number, 1.0)
        [trial] = optuna.load_study(study_name=study.study_name, storage=store).trials
    assert trial.state == TrialState.COMPLETE
    prediction = prediction_of(trial)
    assert prediction is not None and prediction.outcome == "converges"


def test_enqueued_trials_are_predicted_and_decided_like_others() -> None:
    study = _study()
    for params in (FAST, DIVERGING, SLOW, HOPELESS):
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=4)
    assert [trial.params for trial in study.trials] == [FAST, DIVERGING, SLOW, HOPELESS]
    decisions = [decision_of(trial) for trial in study.trials]
    assert [d.action for d in decisions if d is not None] == ["run", "skip", "run", "skip"]


def test_enqueued_trials_may_fix_some_parameters_only() -> None:
    study = _study(samplers.TPESampler(seed=0, n_startup_trials=3))
    study.optimize(objective, n_trials=4)
    for momentum in (0.0, 0.9, 0.5):
        study.enqueue_trial({"momentum": momentum})
    study.optimize(objective, n_trials=3)
    _check(study.trials, 7)
    assert [trial.params["momentum"] for trial in study.trials[4:]] == [0.0, 0.9, 0.5]


@pytest.mark.parametrize("base", list(BASES.values()), ids=list(BASES))
def test_a_conditional_space_trains_every_branch(base: Callable[[], BaseSampler]) -> None:
    def branches(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)
        trial.suggest_int("batch_size", 1, 24)
        if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
            trial.suggest_float("momentum", 0.0, 0.95)
        if trial.should_prune():
            raise optuna.TrialPruned
        return abs(math.log(rate))

    predictor = quick_predictor()
    mapping = HyperparameterMap(
        momentum=lambda p: p["momentum"] if p["optimizer"] == "sgd" else None
    )
    study = optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), base(), hyperparameters=mapping, seed=0),
        pruner=TTPPruner(predictor, hyperparameters=mapping),
    )
    study.enqueue_trial({"optimizer": "adam"})
    study.enqueue_trial({"optimizer": "sgd", "learning_rate": 50.0, "momentum": 0.9})
    study.optimize(branches, n_trials=10)
    adam = [trial for trial in study.trials if trial.params["optimizer"] == "adam"]
    assert all(trial.state == TrialState.COMPLETE for trial in adam)
    assert all(prediction_of(trial) is None for trial in adam)
    sgd = [trial for trial in study.trials if trial.params["optimizer"] == "sgd"]
    assert all(prediction_of(trial) is not None for trial in sgd)
    assert study.trials[1].state == TrialState.PRUNED


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("base", ["random", "tpe", "gp", "nsgaii"])
@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_partially_fixed_trials(base: str, outside: bool) -> None:
    fixed = {"batch_size": 6}
    study = _study(BASES[base]())
    if outside:
        study.sampler = samplers.PartialFixedSampler(fixed, study.sampler)
    else:
        inside = samplers.PartialFixedSampler(fixed, BASES[base]())
        study.sampler = TTPSampler(quick_predictor(), BestMetric(), inside, seed=0)
    study.optimize(objective, n_trials=9)
    _check(study.trials, 9)
    assert {trial.params["batch_size"] for trial in study.trials} == {6}


@pytest.mark.parametrize("base", list(BASES.values()), ids=list(BASES))
def test_every_sampler_of_optuna_can_be_the_base(base: Callable[[], BaseSampler]) -> None:
    study = _study(base())
    study.optimize(objective, n_trials=12)
    _check(study.trials, 12)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_cmaes_can_be_the_base() -> None:
    study = _study(samplers.CmaEsSampler(seed=0, warn_independent_sampling=False))
    study.optimize(objective, n_trials=12)
    _check(study.trials, 12)


def _discrete(trial: optuna.Trial) -> float:
    trial.suggest_float("learning_rate", 0.5, 30.5, step=10.0)
    trial.suggest_int("batch_size", 8, 16, step=8)
    momentum = trial.suggest_categorical("momentum", [0.0, 0.9])
    if trial.should_prune():
        raise optuna.TrialPruned
    return float(momentum)


@pytest.mark.parametrize(
    "base",
    [
        samplers.GridSampler(
            {
                "learning_rate": [0.5, 10.5, 20.5, 30.5],
                "batch_size": [8, 16],
                "momentum": [0, 0.9],
            },
            seed=0,
        ),
        samplers.BruteForceSampler(seed=0),
    ],
    ids=str,
)
def test_an_exhaustive_base_sampler_tries_everything_once(base: BaseSampler) -> None:
    study = _study(base)
    study.optimize(_discrete, n_trials=50)
    assert len(study.trials) == 16
    assert len({tuple(sorted(trial.params.items())) for trial in study.trials}) == 16
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_pickled_studies_samplers_and_pruners_go_on() -> None:
    with storage("sqlite") as store:
        study = _study(BASES["tpe"](), storage=store)
        study.enqueue_trial(DIVERGING)
        study.optimize(objective, n_trials=4)
        copy = pickle.loads(pickle.dumps(study))
        copy.optimize(objective, n_trials=2)
        study.sampler = pickle.loads(pickle.dumps(study.sampler))
        study.pruner = pickle.loads(pickle.dumps(study.pruner))
        study.optimize(objective, n_trials=2)
        _check(study.trials, 8)


@pytest.mark.parametrize("base", list(BASES.values()), ids=list(BASES))
def test_a_pickled_study_goes_on_as_the_study_would_have(base: Callable[[], BaseSampler]) -> None:
    study = _study(base())
    study.optimize(objective, n_trials=6)
    copy = pickle.loads(pickle.dumps(study))
    for s in (study, copy):
        s.optimize(objective, n_trials=4)
    assert [t.params for t in copy.trials] == [t.params for t in study.trials]


@pytest.mark.parametrize("base", ["random", "tpe", "gp", "nsgaii", "nsgaiii"])
def test_several_objectives_with_the_sampler_alone(base: str) -> None:
    def two(trial: optuna.Trial) -> tuple[float, float]:
        params = suggest(trial)
        return abs(math.log(params["learning_rate"])), params["momentum"]

    study = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=TTPSampler(quick_predictor(), FastestToTarget(), BASES[base](), seed=0),
    )
    study.optimize(two, n_trials=10)
    _check(study.trials, 10)
    assert study.best_trials


def test_several_objectives_with_the_pruner_are_refused() -> None:
    study = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=TTPSampler(quick_predictor(), BestMetric(), seed=0),
        pruner=TTPPruner(quick_predictor()),
    )
    with pytest.raises(ValueError, match="does not prune in studies with several objectives"):
        study.optimize(lambda trial: (suggest(trial)["momentum"], 0.0), n_trials=1)


def test_the_direction_of_a_study_does_not_matter() -> None:
    study = _study(direction="maximize")
    study.enqueue_trial(FAST)
    study.enqueue_trial(DIVERGING)
    study.optimize(objective, n_trials=8)
    _check(study.trials, 8)
    assert [trial.state.name for trial in study.trials[:2]] == ["COMPLETE", "PRUNED"]


def test_an_objective_that_fails_is_a_failed_trial_and_the_search_goes_on() -> None:
    def sometimes(trial: optuna.Trial) -> float:
        value = objective(trial)
        if trial.number % 3 == 0:
            raise RuntimeError
        return value

    study = _study(samplers.TPESampler(seed=0, n_startup_trials=3))
    for _ in range(4):
        study.enqueue_trial(FAST)
    study.optimize(sometimes, n_trials=9, catch=(RuntimeError,))
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert {0, 3} <= {trial.number for trial in failed}
    for trial in failed:
        assert paid_seconds(trial) >= 0.0
        assert observed_curve(trial) is not None
    lines = str(report(study)).splitlines()
    assert len(lines) == 1 + 9 + 3
    assert lines[-1].startswith("Predictions: learned from ")


def test_an_objective_that_is_nan_is_a_failed_trial_and_the_search_goes_on() -> None:
    study = _study(samplers.TPESampler(seed=0, n_startup_trials=3))
    for _ in range(2):
        study.enqueue_trial(FAST)
    study.optimize(lambda trial: objective(trial) * math.nan, n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    study.enqueue_trial(FAST)
    study.optimize(objective, n_trials=5)
    assert study.best_trial.number >= 2


def test_a_search_is_stopped_by_its_callbacks_and_its_timeout_as_ever() -> None:
    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 2:
            study.stop()

    study = _study()
    study.optimize(objective, callbacks=[stop])
    assert len(study.trials) == 3
    study.optimize(objective, timeout=0.0)
    assert len(study.trials) == 3
