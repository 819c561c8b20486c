"""What a process remembers of a study, by whom it is shared and when it ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import copy
import gc
import pickle
from threading import Barrier
import weakref

import optuna
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study import state_of
from optuna_ttp.study._study_state import StudyState
from tests.studies import objective
from tests.studies import quick_predictor


class _Part:
    """Something that is remembered."""


def test_all_objects_of_a_study_share_one_state() -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="one")
    again = optuna.load_study(storage=storage, study_name="one")
    other = optuna.create_study(storage=storage, study_name="other")
    assert state_of(study) is state_of(again)
    assert state_of(study) is not state_of(other)
    # Their ids are equal.
    assert state_of(optuna.create_study()) is not state_of(optuna.create_study())


def test_a_part_is_shared_and_one_with_an_owner_ends_with_it() -> None:
    state = StudyState()
    assert state.part(_Part) is state.part(_Part)
    first, second = (optuna.samplers.RandomSampler() for _ in range(2))
    part = state.part_of(first, _Part)
    assert part is state.part_of(first, _Part)
    assert part is not state.part_of(second, _Part)
    reference = weakref.ref(part)
    del part, first
    gc.collect()
    assert reference() is None


def test_the_state_ends_with_the_storage_of_its_study() -> None:
    study = optuna.create_study()
    reference = weakref.ref(state_of(study))
    del study
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_study_has_another_state(copied) -> None:  # type: ignore[no-untyped-def]
    study = optuna.create_study()
    part = state_of(study).part(_Part)
    assert state_of(copied(study)).part(_Part) is not part
    assert state_of(study).part(_Part) is part


def test_threads_get_the_same_state_and_the_same_parts() -> None:
    for _ in range(50):
        study, start = optuna.create_study(), Barrier(4)

        def part(_: int, study: optuna.Study = study, start: Barrier = start) -> _Part:
            start.wait()
            return state_of(study).part(_Part)

        with ThreadPoolExecutor(4) as threads:
            parts = list(threads.map(part, range(4)))
        assert len(set(map(id, parts))) == 1


# The curves are made up, and fall faster at first than is predicted.
@pytest.mark.filterwarnings("ignore:Training begins")
def test_two_threads_search_with_one_sampler_and_one_pruner() -> None:
    predictor = quick_predictor()
    study = optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(max_steps=200), seed=0),
        pruner=TTPPruner(predictor),
    )
    study.optimize(objective, n_trials=16, n_jobs=2)
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert len(study.trials) == 16
