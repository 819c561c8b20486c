"""Many workers on one store: nothing is computed twice, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import copy
from functools import partial
import logging
import multiprocessing
import os
from pathlib import Path
import random
import threading
import time
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa

from optuna_ttp import BestMetric
from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp import LearnedConflictError
from optuna_ttp import StoreError
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import _lease
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import leases
from optuna_ttp.task import FineTuningTask
from tests import faults
from tests.cases import spectrum
from tests.models import mlp
from tests.models import vectors
from tests.servers import PostgreSQL


QUICK: dict[str, Any] = {"measure_speed": False, "probe": False, "show_progress_bar": False}

# Built once: a model built while another thread runs one may draw other weights, because torch's
# global generator is shared by all threads.
_MODEL = mlp()


def _task(before: Callable[[], None] | None = None) -> FineTuningTask:
    """A small task, which does something whenever its model runs."""
    task = FineTuningTask(copy.deepcopy(_MODEL), vectors(5))
    if before is not None:
        # A hook is no part of the fingerprint.
        task.model.register_forward_pre_hook(lambda model, inputs: before())
    return task


def _holders(url: str) -> list[str]:
    database = Database(url)
    return list(database.read(lambda c: c.execute(sa.select(leases.c.key)).scalars().all()))


def _end_leases(url: str) -> None:
    """As if their owners had died long ago."""
    Database(url).write(lambda c: c.execute(sa.update(leases).values(expires_at=1.0)))


# Computed once


def test_eight_processes_compute_once_and_get_the_same_bytes(any_url: str) -> None:
    workers = [faults.Worker(faults.get_or_compute, any_url, 0) for _ in range(8)]
    results = {worker.result() for worker in workers}
    assert results == {faults.digest(SpectrumStore(any_url), 0)}
    faults.check(any_url, [0])
    assert _holders(any_url) == []


@pytest.fixture
def busy(any_url: str) -> Iterator[threading.Event]:
    """Another worker is computing the spectrum of the task, until the event is set."""
    finished = threading.Event()
    started = threading.Event()

    def wait() -> None:
        started.set()
        assert finished.wait(60)

    store = SpectrumStore(any_url, lease_seconds=1.0)
    task = _task(wait)
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
        target=lambda: results.append(store.get_or_compute(_task(), **QUICK))
    )
    waiting.start()
    # Longer than the lease: the heart beats.
    time.sleep(1.5)
    assert not results
    assert len(_holders(any_url)) == 1
    busy.set()
    waiting.join()
    logging.getLogger("optuna").removeHandler(caplog.handler)
    messages = [r.getMessage() for r in caplog.records if "Waiting for" in r.getMessage()]
    assert len(messages) == 1
    assert "process" in messages[0]
    assert "computing it for" in messages[0]
    stored = store.get(_task())
    assert stored is not None
    assert results[0].metadata == stored.metadata
    assert _holders(any_url) == []


def test_a_worker_goes_on_with_something_cheaper_if_asked(
    any_url: str, busy: threading.Event
) -> None:
    store = SpectrumStore(any_url)
    cheap = store.get_or_compute(_task(), instead_of_waiting={"rank": 2}, **QUICK)
    assert cheap.rank == 2
    with pytest.raises(ValueError, match="must change engine, dtype, rank or explained_trace"):
        store.get_or_compute(_task(), instead_of_waiting={"device": "cpu"}, **QUICK)
    busy.set()
    whole = store.get_or_compute(_task(), **QUICK)
    assert whole.rank > 2
    again = store.get_or_compute(_task(), instead_of_waiting={"rank": 3}, **QUICK)
    assert again.metadata == whole.metadata


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, SystemExit])
def test_an_owner_that_gives_up_releases_its_lease(
    any_url: str, error: type[BaseException]
) -> None:
    def failing() -> None:
        assert len(_holders(any_url)) == 1
        raise error("Enough.")

    with pytest.raises(error, match="Enough"):
        SpectrumStore(any_url).get_or_compute(_task(failing), **QUICK)
    assert _holders(any_url) == []
    assert SpectrumStore(any_url).get_or_compute(_task(), **QUICK).rank


def test_a_dead_owner_is_succeeded(any_url: str) -> None:
    store = SpectrumStore(any_url)
    key = _key_of_task(store)
    assert _lease.acquire(Database(any_url), key, 60.0) is not None
    assert _lease.acquire(Database(any_url), key, 60.0) is None
    holding = _lease.holding(Database(any_url), key)
    assert holding is not None
    assert 0 <= holding.seconds < 30
    _end_leases(any_url)
    assert _lease.holding(Database(any_url), key) is None
    assert store.get_or_compute(_task(), **QUICK).rank
    assert _holders(any_url) == []


def _key_of_task(store: SpectrumStore) -> str:
    from optuna_ttp.store._identity import key

    return key(_task().fingerprint, {})


def test_only_one_takes_over(any_url: str) -> None:
    database = Database(any_url)
    assert _lease.acquire(database, "a", 60.0) is not None
    _end_leases(any_url)
    start = threading.Barrier(6)
    taken: list[bool] = []

    def take() -> None:
        own = Database(any_url)
        start.wait()
        taken.append(_lease.acquire(own, "a", 60.0) is not None)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True]


def test_a_lease_runs_by_the_clock_of_the_database(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose clock is a day ahead believes nobody dead."""
    database = Database(any_url)
    assert _lease.acquire(database, "a", 60.0) is not None
    for name in ("time", "monotonic"):
        now = getattr(time, name)()
        monkeypatch.setattr(time, name, lambda now=now: now + 86400.0)
    assert _lease.acquire(database, "a", 60.0) is None
    assert _lease.holding(database, "a") is not None


def test_an_owner_that_lost_its_lease_says_so_and_releases_nothing(
    any_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(any_url)
    lease = _lease.acquire(database, "a", 0.4)
    assert lease is not None
    logging.getLogger("optuna").addHandler(caplog.handler)
    with lease:
        _end_leases(any_url)
        successor = _lease.acquire(database, "a", 60.0)
        assert successor is not None
        time.sleep(0.6)
    logging.getLogger("optuna").removeHandler(caplog.handler)
    assert "Another worker has taken over" in caplog.text
    assert _lease.holding(database, "a") is not None


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_lease_seconds_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"lease_seconds must be at least 0\.1 but got"):
        SpectrumStore("sqlite://", lease_seconds=seconds)


def test_two_that_race_leave_one_row(any_url: str) -> None:
    stores = [SpectrumStore(any_url) for _ in range(4)]
    start = threading.Barrier(4)

    def put(store: SpectrumStore) -> None:
        start.wait()
        for _ in range(2):
            store.put(spectrum())
            store.put(spectrum(), overwrite=True)

    threads = [threading.Thread(target=put, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].list()) == 1
    assert stores[0].verify().is_clean
    assert stores[0].get(spectrum().metadata.fingerprint) is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Nothing is forked here.")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_uses_connections_of_its_own(any_url: str) -> None:
    store = SpectrumStore(any_url)
    store.put_learned("f" * 64, "seen", 0)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_count, args=(store,)) for _ in range(3)]
    for child in children:
        child.start()
    _count(store)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 3
    found = store.get_learned("f" * 64, "seen")
    assert found is not None
    # Also of those that say the same, none is lost.
    assert (found.payload, found.version) == (40, 41)


def _count(store: SpectrumStore) -> None:
    for _ in range(10):
        store.update_learned("f" * 64, "seen", lambda old: old + 1)


# Faults. benchmarks/store/faults.py does each of them fifty times.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize(
    "fault", [faults.kill_owner, faults.kill_reader, faults.kill_writer, faults.stop_owner]
)
def test_faults_of_workers(
    kind: str, fault: Callable[..., Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'ttp.db'}"
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql").new_database()
    fault(url, 1, random.Random(fault.__name__), 1.0)
    faults.check(url, [1])


@pytest.mark.slow
def test_server_that_crashes_and_connections_that_are_cut(postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    generator = random.Random(0)
    faults.cut_connection(url, 0, generator, 1.0)
    faults.restart_server(url, 1, generator, 1.0, postgresql)
    faults.check(url, [0, 1])
    # Who opens the store while the server is away waits for it, too.
    postgresql.stop()
    late = faults.Worker(faults.get_or_compute, url, 2)
    late.wait_until_begun()
    time.sleep(2.0)
    postgresql.start()
    assert late.result() == faults.digest(SpectrumStore(url), 2)


@pytest.mark.slow
def test_full_disk() -> None:
    try:
        with faults.small_disk(16) as disk:
            faults.fill_disk(f"sqlite:///{disk / 'ttp.db'}", disk, 0, random.Random(0))
    except PermissionError as error:
        pytest.skip(str(error))


# Checkpoints


def test_blocks_are_kept_until_the_spectrum_is_stored(any_url: str) -> None:
    store = SpectrumStore(any_url)
    block = np.arange(12.0).reshape(3, 4).T
    checkpoint = store.checkpoint(spectrum().metadata.fingerprint, dtype="float64")
    assert checkpoint.load_block("gram/0") is None
    checkpoint.save_block("gram/0", block)
    checkpoint.save_block("gram/1", np.zeros((700, 700), dtype=np.float32))
    checkpoint.save_block("gram/1", np.ones((700, 700), dtype=np.float32))
    successor = SpectrumStore(any_url).checkpoint(spectrum().metadata.fingerprint, dtype="float64")
    found = successor.load_block("gram/0")
    assert found is not None
    np.testing.assert_array_equal(found, block)
    newer = successor.load_block("gram/1")
    assert newer is not None
    assert newer.dtype == np.float32
    assert (newer == 1).all()
    other = store.checkpoint(spectrum().metadata.fingerprint)
    assert other.load_block("gram/0") is None
    other.save_block("gram/0", block)
    assert store.verify().is_clean
    assert store.prune().n_checkpoints == 0
    store.put(spectrum(), dtype="float64")
    assert checkpoint.load_block("gram/0") is None
    assert other.load_block("gram/0") is not None
    other.clear()
    assert other.load_block("gram/0") is None
    assert store.verify().is_clean


def test_blocks_of_two_that_both_believe_to_be_the_owner_leave_nothing_behind(
    any_url: str,
) -> None:
    def save(seed: int) -> None:
        checkpoint = SpectrumStore(any_url).checkpoint("f" * 64)
        generator = random.Random(seed)
        for _ in range(40):
            if generator.random() < 0.3:
                checkpoint.clear()
            else:
                checkpoint.save_block("gram/0", np.full(50, seed))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(save, range(3)))
    store = SpectrumStore(any_url)
    assert store.verify().is_clean
    found = store.checkpoint("f" * 64).load_block("gram/0")
    assert found is None or len(set(found)) == 1


def test_a_damaged_block_is_computed_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ttp.db'}"
    checkpoint = SpectrumStore(url).checkpoint("f" * 64)
    checkpoint.save_block("gram/0", np.ones((30, 30)))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE ttp_chunks SET data = zeroblob(length(data))"))
    engine.dispose()
    with pytest.warns(DamagedSpectrumWarning, match=r"block 'gram/0' is damaged and computed"):
        assert checkpoint.load_block("gram/0") is None


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_block_names_out_of_range_are_refused(name: str) -> None:
    checkpoint = SpectrumStore("sqlite://").checkpoint("f" * 64)
    with pytest.raises(ValueError, match="name must have 1 to 255 characters but got"):
        checkpoint.save_block(name, np.ones(3))


# What was learned


def test_learned_values_come_back_with_their_version(any_url: str) -> None:
    store = SpectrumStore(any_url)
    payload = {"trials": [[1, 0.5], [2, None]], "name": "Über"}
    assert store.get_learned("f" * 64, "observations") is None
    assert store.put_learned("f" * 64, "observations", payload) == 1
    found = store.get_learned("f" * 64, "observations")
    assert found is not None
    assert (found.payload, found.version) == (payload, 1)
    assert found.updated_at.startswith("20")
    assert store.put_learned("f" * 64, "observations", [], version=1) == 2
    for other in (
        store.get_learned("e" * 64, "observations"),
        store.get_learned("f" * 64, "growth"),
        store.get_learned("f" * 64, "observations", settings={"rank": 3}),
    ):
        assert other is None


@pytest.mark.parametrize("version", [0, 1, 3])
def test_learned_values_are_not_overwritten_unseen(any_url: str, version: int) -> None:
    store = SpectrumStore(any_url)
    store.put_learned("f" * 64, "observations", "first")
    store.put_learned("f" * 64, "observations", "second", version=1)
    with pytest.raises(LearnedConflictError, match=rf"version {version} to be replaced"):
        store.put_learned("f" * 64, "observations", "mine", version=version)
    found = store.get_learned("f" * 64, "observations")
    assert found is not None
    assert found.payload == "second"


def _with(mine: list[int], old: list[list[int]] | None) -> list[list[int]]:
    return [*(old or []), mine]


def test_no_merge_is_lost(any_url: str) -> None:
    def work(worker: int) -> None:
        store = SpectrumStore(any_url)
        for i in range(8):
            merge = partial(_with, [worker, i])
            store.update_learned("f" * 64, "seen", merge)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = SpectrumStore(any_url).get_learned("f" * 64, "seen")
    assert found is not None
    assert sorted(found.payload) == [[w, i] for w in range(4) for i in range(8)]
    assert found.version == 32


@pytest.mark.parametrize("payload", [float("nan"), {"a": {1, 2}}, [np.float32(1)], b"bytes"])
def test_what_is_not_json_is_not_learned(payload: Any) -> None:
    with pytest.raises(ValueError, match="payload must be JSON but got"):
        SpectrumStore("sqlite://").put_learned("f" * 64, "observations", payload)


def test_learned_values_that_are_not_json_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ttp.db'}"
    store = SpectrumStore(url)
    store.put_learned("f" * 64, "observations", 1)
    engine = sa.create_engine(url)
    for text in ("{not json", "[" * 100_000):
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE ttp_learned SET payload = :t"), {"t": text})
        with pytest.raises(StoreError, match="must be JSON but got something else"):
            store.get_learned("f" * 64, "observations")
    engine.dispose()


# Workers without the database


def test_workers_of_a_grpc_proxy_read_a_spectrum_file(tmp_path: Path) -> None:
    from optuna.testing.storages import StorageSupplier

    from optuna_ttp import TrainingTimePredictor
    from optuna_ttp import TTPPruner
    from optuna_ttp import TTPSampler

    SpectrumStore("sqlite://").get_or_compute(_task(), **{**QUICK, "probe": True}).save(
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
