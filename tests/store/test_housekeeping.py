"""Eviction and deletion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from optuna_ttp.store import _lease
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import checkpoints
from tests.store.examples import fill
from tests.store.examples import named
from tests.store.examples import names_of


def test_the_least_recently_used_make_way(any_url: str) -> None:
    store, n_bytes = fill(any_url, "abcd")
    # Reading is using.
    assert store.get(named("a").metadata.fingerprint, dtype="float64") is not None
    assert store.prune(max_bytes=4 * n_bytes).n_evicted == 0
    pruning = store.prune(max_bytes=2 * n_bytes)
    assert pruning.n_evicted == 2
    assert pruning.n_bytes_left <= 2 * n_bytes
    assert names_of(store) == "ad"
    assert store.verify().is_clean
    assert store.prune(max_bytes=0).n_bytes_left == 0


def test_what_somebody_works_on_is_not_evicted(any_url: str) -> None:
    store, _ = fill(any_url, "abc")
    [key] = [stored.key for stored in store.list() if stored.name == "a"]
    lease = _lease.acquire(Database(any_url), key, 60.0)
    assert lease is not None
    assert store.prune(max_bytes=0).n_evicted == 2
    assert names_of(store) == "a"
    with lease:
        pass
    assert store.prune(max_bytes=0).n_evicted == 1


def test_a_store_with_a_limit_keeps_to_it(any_url: str) -> None:
    _, n_bytes = fill(any_url, "abc")
    store = SpectrumStore(any_url, max_bytes=2 * n_bytes + n_bytes // 2)
    store.put(named("d"), dtype="float64")
    assert names_of(store) == "cd"
    # The newest stays even where it alone is too large.
    SpectrumStore(any_url, max_bytes=0).put(named("e"), dtype="float64")
    assert names_of(store) == "e"
    assert store.verify().is_clean


@pytest.mark.parametrize(
    ("limit", "error"), [(-1, ValueError), (float("nan"), ValueError), ("10MB", TypeError)]
)
def test_prune_refuses_a_limit_that_is_none(url: str, limit: Any, error: type[Exception]) -> None:
    store, _ = fill(url, "ab")
    for ask in (store.prune, lambda max_bytes: SpectrumStore(url, max_bytes=max_bytes)):
        with pytest.raises(error, match=r"max_bytes must be (nonnegative|a number) .*but got"):
            ask(max_bytes=limit)
    assert names_of(store) == "ab"


def test_prune_deletes_what_is_of_no_use_and_nothing_else(any_url: str) -> None:
    store, _ = fill(any_url, "ab")
    database = Database(any_url)
    for name, key in (("forgotten", "c" * 64), ("fresh", "d" * 64)):
        store.checkpoint(key).save_block(name, np.ones(3))
    week = sa.update(checkpoints).where(checkpoints.c.name == "forgotten").values(saved_at=1.0)
    database.write(lambda c: c.execute(week))
    orphan = "INSERT INTO ttp_chunks (blob, position, data) SELECT 'x', 0, data FROM ttp_chunks "
    if not any_url.startswith("mysql"):
        database.write(lambda c: c.execute(sa.text(orphan + "WHERE position = 0 LIMIT 1")))
        assert store.verify().n_orphaned == 1
    pruning = store.prune()
    assert (pruning.n_evicted, pruning.n_checkpoints) == (0, 1)
    assert pruning.n_orphaned == (0 if any_url.startswith("mysql") else 1)
    assert names_of(store) == "ab"
    assert store.checkpoint("d" * 64).load_block("fresh") is not None
    assert store.verify().is_clean


def test_prune_gives_space_back_unless_somebody_reads(url: str) -> None:
    store, _ = fill(url, "abcdefgh")
    path = Path(url.removeprefix("sqlite:///"))
    before = path.stat().st_size
    engine = sa.create_engine(url)
    with engine.connect() as reader:
        assert len(reader.execute(sa.text("SELECT * FROM ttp_spectra")).fetchmany(1)) == 1
        assert store.prune(max_bytes=0).n_evicted == 8
    engine.dispose()
    store.put(named("a"), dtype="float64")
    assert store.prune(max_bytes=0).n_evicted == 1
    assert path.stat().st_size < before
