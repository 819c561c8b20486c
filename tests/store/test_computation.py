"""Each spectrum is computed once, and the others wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
import logging
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask
from tests import faults
from tests.models import mlp
from tests.models import vectors
from tests.store.examples import assert_equal
from tests.store.examples import Counting
from tests.store.examples import holders
from tests.store.examples import QUICK
from tests.store.examples import small_task


def test_spectrum_is_computed_once(url: str) -> None:
    counting = Counting()
    settings = {**QUICK, "probe": True}
    first = SpectrumStore(url).get_or_compute(counting.task, **settings)
    assert counting.n_calls > 0
    counting.n_calls = 0
    assert_equal(SpectrumStore(url).get_or_compute(counting.task, **settings), first)
    again = Counting(name="the same task by another name")
    assert_equal(SpectrumStore(url).get_or_compute(again.task, **settings), first)
    assert (counting.n_calls, again.n_calls) == (0, 0)
    assert len(SpectrumStore(url).list()) == 1


def test_spectrum_is_computed_again_for_other_weights_or_settings() -> None:
    store = SpectrumStore("sqlite://")
    counting = Counting()
    settings: list[dict[str, Any]] = [
        {},
        {"rank": 3},
        {"rank": 4},
        {"explained_trace": 0.9},
        {"dtype": "float64"},
    ]
    for chosen in settings:
        counting.n_calls = 0
        computed = store.get_or_compute(counting.task, **chosen, **QUICK)
        assert counting.n_calls > 0
        counting.n_calls = 0
        assert_equal(store.get_or_compute(counting.task, **chosen, **QUICK), computed)
        assert counting.n_calls == 0
    with torch.no_grad():
        next(counting.task.model.parameters()).add_(0.1)
    store.get_or_compute(counting.task, **QUICK)
    assert counting.n_calls > 0
    assert len(store.list()) == 6
    assert store.get_or_compute(counting.task, rank=3, **QUICK).rank == 3


def test_columns_are_filed_under_their_seed_and_the_number_that_memory_allows() -> None:
    task = FineTuningTask(mlp(), vectors(20))
    store = SpectrumStore("sqlite://")
    settings: dict[str, Any] = {"engine": "columns", "measure_speed": False, "probe": False}
    first = store.get_or_compute(task, **settings)
    other = store.get_or_compute(task, seed=1, **settings)
    assert (first.metadata.seed, other.metadata.seed) == (0, 1)
    assert len(store.list()) == 2
    assert_equal(store.get_or_compute(task, seed=1, **settings), other)
    loaded = store.get(task, engine="columns", seed=1)
    assert loaded is not None
    assert_equal(loaded, other)
    # More memory changes nothing, because all columns are there.
    assert_equal(store.get_or_compute(task, max_memory=2**34, **settings), first)
    # 60 rows of all but one column, three times.
    n_columns = task.n_parameters - 1
    with pytest.raises(ValueError, match="max_memory must be at least"):
        store.get_or_compute(task, max_memory=60 * n_columns * 4 * 3, **settings)
    with pytest.raises(ValueError, match="computed with seed=1 but got seed=0"):
        store.put(other, engine="columns", seed=0)
    # What is exact has no seed.
    exact = {**settings, "engine": "exact"}
    for seed in (0, 1):
        store.get_or_compute(task, seed=seed, **exact)
    assert len(store.list()) == 3


def test_fewer_columns_for_less_memory_are_another_spectrum() -> None:
    torch.manual_seed(0)
    data = (torch.randn(6, 400), torch.arange(6) % 3)
    task = FineTuningTask(torch.nn.Linear(400, 3), data)
    store = SpectrumStore("sqlite://")
    settings: dict[str, Any] = {"measure_speed": False, "probe": False}
    whole = store.get_or_compute(task, **settings)
    fewer = store.get_or_compute(task, max_memory=18 * 600 * 4 * 3, **settings)
    assert len(store.list()) == 2
    found = store.get(task)
    assert found is not None
    assert_equal(found, whole)
    stored = store.get(task, engine="columns", max_columns=600)
    assert stored is not None
    assert_equal(stored, fewer)


def test_without_an_engine_any_stored_spectrum_is_found() -> None:
    task = FineTuningTask(mlp(), vectors(20))
    store = SpectrumStore("sqlite://")
    settings: dict[str, Any] = {"measure_speed": False, "probe": False}
    for engine in ("matrix_free", "exact", "columns"):
        computed = store.get_or_compute(task, engine=engine, **settings)
        found = store.get(task)
        assert found is not None
        assert_equal(found, computed)
    other = SpectrumStore("sqlite://")
    other.put(computed)
    assert other.get(task, engine="exact") is None
    assert other.get(task, engine="columns") is not None


def test_where_and_how_fast_it_is_computed_is_no_setting() -> None:
    store = SpectrumStore("sqlite://")
    counting = Counting()
    first = store.get_or_compute(counting.task, **QUICK)
    counting.n_calls = 0
    second = store.get_or_compute(
        counting.task,
        device="cpu",
        max_memory=2**28,
        **QUICK,
    )
    assert counting.n_calls == 0
    assert_equal(first, second)


def test_the_time_of_a_step_is_measured_where_the_stored_spectrum_lacks_it() -> None:
    store = SpectrumStore("sqlite://")
    task = Counting().task
    assert store.get_or_compute(task, **QUICK).throughput is None
    again = store.get_or_compute(task, show_progress_bar=False)
    assert again.throughput is not None
    assert len(store.list()) == 1


def test_saturation_is_measured_where_the_stored_spectrum_lacks_it() -> None:
    """Spectra that the last release stored have a probe only."""
    store = SpectrumStore("sqlite://")
    counting = Counting()
    settings = {**QUICK, "probe": True}
    whole = store.get_or_compute(counting.task, **settings)
    store.put(replace(whole, saturation=None), overwrite=True)
    loaded = store.get(counting.task)
    assert loaded is not None
    assert loaded.saturation is None
    for completed in (store.get_or_compute(counting.task, **settings), store.get(counting.task)):
        assert completed is not None
        assert completed.saturation is not None
        assert whole.saturation is not None
        for name, values in vars(whole.saturation).items():
            np.testing.assert_array_equal(getattr(completed.saturation, name), values)


def test_defaults_and_numpy_numbers_name_the_same_spectrum() -> None:
    store = SpectrumStore("sqlite://")
    task = Counting().task
    spelled: dict[str, Any] = {
        "engine": "exact",
        "dtype": "float32",
        "rank": None,
        "explained_trace": None,
        "seed": 0,
    }
    first = store.get_or_compute(task, **spelled, **QUICK)
    loaded = store.get(task)
    assert loaded is not None
    assert_equal(loaded, first)
    cut = store.get_or_compute(task, rank=np.int64(3), explained_trace=np.float64(1.0), **QUICK)
    loaded = store.get(task, rank=3, explained_trace=1)
    assert loaded is not None
    assert_equal(loaded, cut)


def test_a_misspelt_setting_is_refused_also_where_a_spectrum_is_stored() -> None:
    store = SpectrumStore("sqlite://")
    counting = Counting()
    store.get_or_compute(counting.task, **QUICK)
    with pytest.raises(TypeError, match=r"compute_spectrum takes .*explained_trace.*but got expl"):
        store.get_or_compute(counting.task, **QUICK, explaned_trace=0.9)
    with pytest.raises(TypeError, match=r"compute_spectrum takes .* but got ranc"):
        store.get_or_compute(counting.task, **QUICK, instead_of_waiting={"ranc": 3})
    task: Any = counting.task.fingerprint
    with pytest.raises(TypeError, match="task must be a FineTuningTask but got str"):
        store.get_or_compute(task)


def test_failed_computation_stores_nothing() -> None:
    store = SpectrumStore("sqlite://")
    task = FineTuningTask(mlp(), vectors(4), forward=lambda model, x: 0.0 * model(x))
    with pytest.raises(ValueError, match="Jacobian must not be zero"):
        store.get_or_compute(task, **QUICK)
    assert store.list() == []


def test_eight_processes_compute_once_and_get_the_same_bytes(any_url: str) -> None:
    workers = [faults.Worker(faults.get_or_compute, any_url, 0) for _ in range(8)]
    results = {worker.result() for worker in workers}
    assert results == {faults.digest(SpectrumStore(any_url), 0)}
    faults.check(any_url, [0])
    assert holders(any_url) == []


@pytest.fixture
def busy(any_url: str) -> Iterator[threading.Event]:
    """Another worker is computing the spectrum of the task, until the event is set."""
    finished = threading.Event()
    started = threading.Event()

    def wait() -> None:
        started.set()
        assert finished.wait(60)

    store = SpectrumStore(any_url, lease_seconds=1.0)
    task = small_task(wait)
    worker = threading.Thread(target=lambda: store.get_or_compute(task, **QUICK))
    worker.start()
    assert started.wait(60)
    yield finished
    finished.set()
    worker.join()


def test_a_worker_waits_and_says_so(
    any_url: str, busy: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("optuna").addHandler(caplog.handler)
    results: list[Spectrum] = []
    store = SpectrumStore(any_url)
    waiting = threading.Thread(
        target=lambda: results.append(store.get_or_compute(small_task(), **QUICK))
    )
    waiting.start()
    # Longer than the lease: the heart beats.
    time.sleep(1.5)
    assert not results
    assert len(holders(any_url)) == 1
    busy.set()
    waiting.join()
    logging.getLogger("optuna").removeHandler(caplog.handler)
    messages = [r.getMessage() for r in caplog.records if "Waiting for" in r.getMessage()]
    assert len(messages) == 1
    assert "process" in messages[0]
    assert "computing it for" in messages[0]
    stored = store.get(small_task())
    assert stored is not None
    assert results[0].metadata == stored.metadata
    assert holders(any_url) == []


def test_a_worker_goes_on_with_something_cheaper_if_asked(
    any_url: str, busy: threading.Event
) -> None:
    store = SpectrumStore(any_url)
    cheap = store.get_or_compute(small_task(), instead_of_waiting={"rank": 2}, **QUICK)
    assert cheap.rank == 2
    with pytest.raises(ValueError, match="must change engine, dtype, rank or explained_trace"):
        store.get_or_compute(small_task(), instead_of_waiting={"device": "cpu"}, **QUICK)
    busy.set()
    whole = store.get_or_compute(small_task(), **QUICK)
    assert whole.rank > 2
    again = store.get_or_compute(small_task(), instead_of_waiting={"rank": 3}, **QUICK)
    assert again.metadata == whole.metadata
