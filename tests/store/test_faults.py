"""Many workers on one store, killed, stopped and cut off: nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
import multiprocessing
import os
from pathlib import Path
import random
import threading
import time
from typing import Any

import pytest

from optuna_ttp.store import SpectrumStore
from tests import faults
from tests.cases import spectrum
from tests.servers import PostgreSQL
from tests.store.examples import Counting


def test_processes_share_a_database_at_once(url: str) -> None:
    # They make the tables and the rows at once.
    assert faults.at_once(2, faults.compute_three_ranks, url) == [4, 4]
    store = SpectrumStore(url)
    assert len(store.list()) == 4
    for rank in (1, 2, 3):
        stored = store.get(faults.task(0, n_samples=5), rank=rank)
        assert stored is not None
        assert stored.rank == rank


def test_threads_share_a_store(url: str) -> None:
    store = SpectrumStore(url)
    task = Counting().task
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for _ in range(3):
                store.put(spectrum())
                assert store.get(task) is None
                store.list()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.list()) == 1


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
def test_a_forked_process_opens_new_connections(any_url: str) -> None:
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
    loaded = store.get_learned("f" * 64, "seen")
    assert loaded is not None
    # Also of those that say the same, none is lost.
    assert (loaded.payload, loaded.version) == (40, 41)


def _count(store: SpectrumStore) -> None:
    for _ in range(10):
        store.update_learned("f" * 64, "seen", lambda old: old + 1)


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
