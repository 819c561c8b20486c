"""How the sampler calls its base sampler, and what a seed determines."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import GridSampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_ttp import HyperparameterMap
from optuna_ttp.study import MissingParameterError
from tests.studies import BASES
from tests.studies import make_sampler
from tests.studies import mixed_space
from tests.studies import params_of
from tests.studies import proposals
from tests.studies import quick_sampler
from tests.studies import quick_tpe
from tests.studies import QuickGPSampler
from tests.studies import SPACE
from tests.studies import suggest


class _Recording(RandomSampler):
    """Writes down how it is called."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.calls: list[tuple[Any, ...]] = []

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.calls.append(("before_trial", study.study_name, trial.number))

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self.calls.append(("after_trial", study.study_name, trial.number, state, values))

    def reseed_rng(self) -> None:
        self.calls.append(("reseed_rng",))


class _CountingGPSampler(QuickGPSampler):
    def __init__(self) -> None:
        super().__init__(seed=0, n_startup_trials=4)
        self.asked: list[int] = []

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self.asked.append(trial.number)
        return super().sample_relative(study, trial, search_space)


def test_calls_around_a_trial_reach_the_base_sampler_once() -> None:
    def objective(trial: optuna.Trial) -> float:
        suggest(trial)
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise RuntimeError
        return 2.5

    base = _Recording()
    study = optuna.create_study(sampler=quick_sampler(base))
    study.optimize(objective, n_trials=3, catch=(RuntimeError,))
    ends = [(TrialState.COMPLETE, [2.5]), (TrialState.PRUNED, None), (TrialState.FAIL, None)]
    expected: list[tuple[Any, ...]] = []
    for number, end in enumerate(ends):
        expected.append(("before_trial", study.study_name, number))
        expected.append(("after_trial", study.study_name, number, *end))
    assert base.calls == expected


def test_reseeding_reaches_the_base_sampler_once() -> None:
    base = _Recording()
    quick_sampler(base).reseed_rng()
    assert base.calls == [("reseed_rng",)]


def test_workers_that_reseed_do_not_explore_in_step() -> None:
    def run(reseed: bool) -> list[dict[str, Any]]:
        # This base sampler draws the same, reseeded or not.
        sampler = quick_sampler(_Recording(), exploration=0.5, search_space=SPACE)
        if reseed:
            sampler.reseed_rng()
        return proposals(sampler, 12)

    assert run(False) == run(False)
    assert run(True) != run(True)


def test_after_trial_reaches_the_base_sampler_even_where_the_map_is_wrong() -> None:
    base = _Recording()
    mapping = HyperparameterMap(learning_rate="lr")
    study = optuna.create_study(sampler=quick_sampler(base, hyperparameters=mapping))
    with pytest.raises(MissingParameterError):
        study.optimize(lambda trial: suggest(trial)["momentum"], n_trials=1)
    assert [call[0] for call in base.calls] == ["before_trial", "after_trial"]
    assert study.trials[0].state == TrialState.COMPLETE


@pytest.mark.parametrize("base", [BASES["random"], BASES["tpe"], BASES["gp"]])
def test_the_same_seed_gives_the_same_trials(base: Callable[[], BaseSampler]) -> None:
    runs = [params_of(quick_sampler(base(), seed=seed), mixed_space, 10) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_default_base_sampler_is_tpe_with_the_same_seed() -> None:
    ours = params_of(make_sampler(exploration=1.0, seed=7), mixed_space, 15)
    assert ours == params_of(TPESampler(seed=7), mixed_space, 15)
    assert str(make_sampler()) == "TTPSampler(TPESampler)"


@pytest.mark.parametrize("exploration", [0.0, 0.5, 1.0])
def test_a_study_that_goes_on_with_a_new_sampler_does_not_repeat_itself(
    exploration: float,
) -> None:
    def run() -> list[tuple[Any, ...]]:
        study = optuna.create_study()
        for _ in range(3):
            study.sampler = make_sampler(exploration=exploration, seed=1)
            study.optimize(lambda trial: abs(suggest(trial)["momentum"] - 0.5), n_trials=7)
        return [tuple(t.params.values()) for t in study.trials]

    proposed = run()
    assert len(set(proposed)) == 21
    assert run() == proposed


@pytest.mark.slow
def test_the_same_seed_gives_the_same_trials_in_another_process() -> None:
    code = (
        "import json; from tests.search.test_sampler_calls import seeded_trials; "
        "print(json.dumps(seeded_trials()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        # The hashes of this process are random, or given otherwise.
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert json.loads(done.stdout) == seeded_trials()


def seeded_trials() -> list[dict[str, Any]]:
    mapping = HyperparameterMap(
        learning_rate=lambda p: p["learning_rate"] * (1 + p["layers"]),
        batch_size=lambda p: p["batch_size"],
    )
    sampler = quick_sampler(quick_tpe(), hyperparameters=mapping)
    return params_of(sampler, mixed_space, 12)


def test_one_sampler_serves_several_studies() -> None:
    def narrow(trial: optuna.Trial) -> float:
        trial.suggest_int("batch_size", 1, 24)
        trial.suggest_float("momentum", 0.0, 0.95)
        return trial.suggest_float("learning_rate", 0.001, 0.002)

    # As its base sampler does. In memory, all studies have the same id.
    sampler = quick_sampler(RandomSampler(seed=1))
    params_of(sampler, mixed_space, 5)
    params = params_of(sampler, narrow, 10)
    assert all(0.001 <= p["learning_rate"] <= 0.002 for p in params)
    study = optuna.create_study(sampler=sampler, storage="sqlite://")
    study.optimize(mixed_space, n_trials=3)
    assert len(study.trials) == 3


def test_the_gaussian_process_is_asked_once_a_trial() -> None:
    base = _CountingGPSampler()
    params_of(quick_sampler(base, exploration=0.0), mixed_space, 9)
    # The first trial finds the search space, and the design does not need it.
    assert base.asked == [0, 5, 6, 7, 8]


def test_a_quasi_random_sequence_is_used_up_as_without_us() -> None:
    ours = proposals(quick_sampler(QMCSampler(seed=1)), 20)
    # The first trial is drawn at random, to find the search space.
    assert ours[1:] == proposals(QMCSampler(seed=1), 20)[1:]


def test_a_given_search_space_is_not_forced_on_a_base_sampler_that_does_not_know_it() -> None:
    space: dict[str, BaseDistribution] = {
        **SPACE,
        "momentum": CategoricalDistribution([0.0, 0.9]),
    }

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_categorical("momentum", [0.0, 0.9])
        trial.suggest_int("batch_size", 1, 24)
        return trial.suggest_float("learning_rate", 1e-5, 100.0, log=True)

    # A quasi-random sequence takes numbers only; a grid none but its own parameters.
    quasi_random = quick_sampler(
        QMCSampler(seed=1, warn_independent_sampling=False), search_space=space
    )
    assert {p["momentum"] for p in params_of(quasi_random, objective, 12)} == {0.0, 0.9}
    grid: dict[str, Sequence[float]] = {
        "learning_rate": [0.1, 1.0],
        "batch_size": [4, 8],
        "momentum": [0.0, 0.9],
    }
    params = params_of(quick_sampler(GridSampler(grid, seed=1), search_space=space), objective, 20)
    assert len(params) == 8
    assert len({tuple(sorted(p.items())) for p in params}) == 8


def test_a_genetic_base_sampler_counts_its_generations_as_without_us() -> None:
    def generations(sampler: BaseSampler) -> list[int]:
        study = optuna.create_study(sampler=sampler)
        study.optimize(mixed_space, n_trials=20)
        return [
            next(v for k, v in t.system_attrs.items() if k.endswith("generation"))
            for t in study.trials
        ]

    def base() -> BaseSampler:
        return NSGAIISampler(population_size=5, seed=1)

    ours = generations(quick_sampler(base(), search_space=SPACE))
    assert ours == generations(base())
    assert max(ours) == 3
