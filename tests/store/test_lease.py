"""Who computes: leases by the clock of the database."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import sqlalchemy as sa

from optuna_ttp.store import _lease
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import leases
from tests.store.examples import end_leases
from tests.store.examples import holders
from tests.store.examples import QUICK
from tests.store.examples import small_task


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, SystemExit])
def test_an_owner_that_gives_up_releases_its_lease(
    any_url: str, error: type[BaseException]
) -> None:
    def failing() -> None:
        assert len(holders(any_url)) == 1
        raise error("Enough.")

    with pytest.raises(error, match="Enough"):
        SpectrumStore(any_url).get_or_compute(small_task(failing), **QUICK)
    assert holders(any_url) == []
    assert SpectrumStore(any_url).get_or_compute(small_task(), **QUICK).rank


def test_a_dead_owner_is_succeeded(any_url: str) -> None:
    store = SpectrumStore(any_url)
    key = _key_of_task(store)
    assert _lease.acquire(Database(any_url), key, 60.0) is not None
    assert _lease.acquire(Database(any_url), key, 60.0) is None
    holding = _lease.holding(Database(any_url), key)
    assert holding is not None
    assert 0 <= holding.seconds < 30
    end_leases(any_url)
    assert _lease.holding(Database(any_url), key) is None
    assert store.get_or_compute(small_task(), **QUICK).rank
    assert holders(any_url) == []


def _key_of_task(store: SpectrumStore) -> str:
    from optuna_ttp.store._identity import key

    return key(small_task().fingerprint, {"engine": "columns"})


def test_only_one_takes_over(any_url: str) -> None:
    database = Database(any_url)
    assert _lease.acquire(database, "a", 60.0) is not None
    end_leases(any_url)
    start = threading.Barrier(6)
    taken: list[bool] = []

    def take() -> None:
        database = Database(any_url)
        start.wait()
        taken.append(_lease.acquire(database, "a", 60.0) is not None)

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
        # In one statement: the owner's next sign of life must not come between two.
        taken_over = {"owner": "successor", "expires_at": DatabaseTime() + 60.0}
        database.write(lambda c: c.execute(sa.update(leases).values(taken_over)))
        deadline = time.monotonic() + 30
        while "Another worker has taken over" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    logging.getLogger("optuna").removeHandler(caplog.handler)
    assert "Another worker has taken over" in caplog.text
    assert _lease.holding(database, "a") is not None


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_lease_seconds_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"lease_seconds must be at least 0\.1 but got"):
        SpectrumStore("sqlite://", lease_seconds=seconds)
