"""Spectra in and out of the store."""

from __future__ import annotations

from dataclasses import replace
import json
from pathlib import Path
import pickle
from typing import Any
import uuid

import optuna
import pytest
import torch

from optuna_ttp import BestMetric
from optuna_ttp import DamagedSpectrumError
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from tests.cases import spectrum
from tests.store.examples import assert_equal
from tests.store.examples import Counting
from tests.store.examples import named
from tests.store.examples import QUICK
from tests.store.examples import small_task


def test_a_spectrum_is_not_stored_under_settings_that_it_was_not_computed_with() -> None:
    store = SpectrumStore("sqlite://")
    with pytest.raises(ValueError, match=r"has rank \d+ but got rank=1"):
        store.put(spectrum(), rank=1)
    other = "float32" if spectrum().metadata.dtype == "float64" else "float64"
    with pytest.raises(ValueError, match=f"but got dtype='{other}' to store it under"):
        store.put(spectrum(), dtype=other)
    with pytest.raises(TypeError, match="must be a Spectrum but got int"):
        store.put(3)  # type: ignore[arg-type]
    assert store.list() == []


def test_get_gives_none_where_there_is_nothing() -> None:
    store = SpectrumStore("sqlite://")
    task = Counting().task
    assert store.get(task) is None
    assert store.get("0" * 64) is None
    store.put(spectrum())
    assert store.get(spectrum().metadata.fingerprint, rank=2) is None


def test_put_keeps_what_is_there() -> None:
    store = SpectrumStore("sqlite://")
    original = spectrum()
    later = replace(original, metadata=replace(original.metadata, name="later"))
    store.put(original)
    store.put(later)
    loaded = store.get(original.metadata.fingerprint)
    assert loaded is not None
    assert_equal(loaded, original)


@pytest.mark.parametrize("method", ["get", "put"])
def test_unknown_settings_are_refused(url: str, method: str) -> None:
    subject = {"get": spectrum().metadata.fingerprint, "put": spectrum()}[method]
    with pytest.raises(TypeError, match=r"max_columns but got device"):
        getattr(SpectrumStore(url), method)(subject, device="cpu")
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        getattr(SpectrumStore(url), method)(subject, rank=0)


def test_what_is_no_name_or_number_is_refused_in_words() -> None:
    wrong: Any = torch.float64
    with pytest.raises(TypeError, match=r"dtype must be a name but got torch\.float64"):
        SpectrumStore("sqlite://").get("f" * 64, dtype=wrong)
    seconds: Any = "60"
    with pytest.raises(TypeError, match="lease_seconds must be a number but got '60'"):
        SpectrumStore("sqlite://", lease_seconds=seconds)


def test_list_and_delete() -> None:
    store = SpectrumStore("sqlite://")
    assert store.list() == []
    first, second = spectrum(), spectrum("mse")
    store.put(first)
    store.put(first.truncate(rank=2), rank=2)
    store.put(second, dtype="float64")
    listed = store.list()
    assert sorted(s.rank for s in listed) == sorted([first.rank, 2, second.rank])
    (cut,) = [s for s in listed if s.rank == 2]
    assert cut.fingerprint == first.metadata.fingerprint
    assert cut.name == first.metadata.name
    assert cut.settings == {
        "engine": "exact",
        "dtype": "float32",
        "rank": 2,
        "explained_trace": None,
        "seed": 0,
        "max_sketch_width": 32768,
        "max_columns": None,
    }
    assert (cut.n_samples, cut.n_outputs) == (12, 3)
    assert cut.n_bytes == len(first.truncate(rank=2).to_bytes())
    assert cut.created_at == first.metadata.created_at
    assert cut.compute_seconds == first.metadata.compute_seconds
    assert store.delete(first.metadata.fingerprint) == 2
    assert store.delete(first.metadata.fingerprint) == 0
    assert [s.fingerprint for s in store.list()] == [second.metadata.fingerprint]


def test_delete_by_task() -> None:
    store = SpectrumStore("sqlite://")
    counting = Counting()
    store.get_or_compute(counting.task, **QUICK)
    assert store.delete(counting.task) == 1
    assert store.get(counting.task) is None


def test_list_is_sorted_by_age() -> None:
    store = SpectrumStore("sqlite://")
    for day in (3, 1, 2):
        metadata = replace(
            spectrum().metadata, fingerprint=uuid.uuid4().hex * 2, created_at=f"2030-01-0{day}"
        )
        store.put(replace(spectrum(), metadata=metadata))
    assert [s.created_at[-1] for s in store.list()] == ["1", "2", "3"]
    assert json.dumps([s.settings for s in store.list()])


def test_store_shares_the_database_of_a_study(url: str) -> None:
    store = SpectrumStore(url)
    store.put(spectrum())
    study = optuna.create_study(storage=url, study_name="mine")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert SpectrumStore(url).get(spectrum().metadata.fingerprint) is not None
    assert len(optuna.load_study(study_name="mine", storage=url).trials) == 2
    other = url.replace("ttp.db", "study.db")
    optuna.create_study(storage=other)
    SpectrumStore(other).put(spectrum())
    assert len(SpectrumStore(other).list()) == 1


def test_pickled_store_reads_the_same_database(url: str) -> None:
    store = SpectrumStore(url)
    store.put(spectrum())
    twin = pickle.loads(pickle.dumps(store))
    assert len(twin.list()) == 1


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes must be nonnegative but got -1"):
        SpectrumStore("sqlite://", max_bytes=-1)
    with pytest.raises(ValueError, match="object_threshold must be nonnegative but got -1"):
        SpectrumStore("sqlite://", object_threshold=-1)


def test_export_and_import_keep_the_settings(tmp_path: Path) -> None:
    store = SpectrumStore("sqlite://")
    store.put(named("a").truncate(rank=2), dtype="float64", rank=2)
    [stored] = store.list()
    path = tmp_path / "a.ttp"
    assert store.export_spectrum(stored.key, path) == stored
    assert Spectrum.load(path).rank == 2
    other = SpectrumStore("sqlite://")
    other.import_spectrum(path)
    assert [s.key for s in other.list()] == [stored.key]
    named("b").save(path)
    other.import_spectrum(path)
    assert other.get(named("b").metadata.fingerprint, dtype="float64") is not None
    assert len(other.list()) == 2
    with pytest.raises(KeyError, match=r"line of SpectrumStore.list\(\) but got '0+'"):
        store.export_spectrum("0" * 64, path)


def test_a_file_with_foreign_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ttp"
    for note in ({"settings": {"unknown": 1}}, {"settings": {"rank": 1}}, {"settings": 3}):
        path.write_bytes(b"".join(named("a").to_pieces(note=note)))
        with pytest.raises(DamagedSpectrumError, match="settings do not fit"):
            SpectrumStore("sqlite://").import_spectrum(path)


def test_workers_of_a_grpc_proxy_read_a_spectrum_file(tmp_path: Path) -> None:
    from optuna.testing.storages import StorageSupplier

    from optuna_ttp import TrainingTimePredictor
    from optuna_ttp import TTPPruner
    from optuna_ttp import TTPSampler

    SpectrumStore("sqlite://").get_or_compute(small_task(), **{**QUICK, "probe": True}).save(
        tmp_path / "task.ttp"
    )

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-3, 1e3, log=True)
        trial.suggest_categorical("batch_size", [2, 4])
        trial.suggest_float("momentum", 0.0, 0.9)
        if trial.should_prune():
            raise optuna.TrialPruned
        return rate

    with StorageSupplier("grpc_rdb") as storage:
        spectrum = Spectrum.load(tmp_path / "task.ttp")
        predictor = TrainingTimePredictor(spectrum, target_fraction=0.7)
        study = optuna.create_study(
            storage=storage,
            sampler=TTPSampler(predictor, BestMetric()),
            pruner=TTPPruner(predictor),
        )
        study.optimize(objective, n_trials=5)
        assert len(study.trials) == 5
        assert not [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
