"""Databases that cannot be opened, their secrets, and files."""

from __future__ import annotations

from collections.abc import Callable
import logging
import os
from pathlib import Path
import sqlite3
import threading
from typing import Any

import pytest
import sqlalchemy as sa

from optuna_ttp import StoreError
from optuna_ttp.store import SpectrumStore
from tests.cases import spectrum
from tests.servers import PostgreSQL
from tests.store.examples import fill
from tests.store.examples import named
from tests.store.examples import names_of


@pytest.mark.skipif(os.name != "posix", reason="File permissions of POSIX.")
def test_database_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "ttp.db"
    SpectrumStore(f"sqlite:///{path}").put(spectrum())
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="File permissions of POSIX.")
def test_permissions_of_an_existing_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "ttp.db"
    path.touch(mode=0o640)
    path.chmod(0o640)
    SpectrumStore(f"sqlite:///{path}")
    assert path.stat().st_mode & 0o777 == 0o640


def test_default_is_a_file_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    SpectrumStore().put(spectrum())
    (path,) = (p for p in tmp_path.rglob("*.db"))
    assert len(SpectrumStore(f"sqlite:///{path}").list()) == 1


@pytest.mark.parametrize(
    "memory_url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:mem?mode=memory&uri=true"]
)
def test_database_in_memory_is_one_for_all_threads(
    memory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = SpectrumStore(memory_url)
    store.put(spectrum())
    lengths: list[int] = []
    thread = threading.Thread(target=lambda: lengths.append(len(store.list())))
    thread.start()
    thread.join()
    assert lengths == [1]
    assert list(tmp_path.iterdir()) == []
    assert SpectrumStore("sqlite://").list() == []


@pytest.mark.parametrize("memory_url", ["sqlite://", "sqlite:///file:mem?mode=memory&uri=true"])
def test_a_database_in_memory_that_was_closed_says_that_its_spectra_are_gone(
    memory_url: str,
) -> None:
    with SpectrumStore(memory_url) as store:
        store.put(spectrum())
    for use in (store.list, lambda: store.put(spectrum())):
        with pytest.raises(StoreError, match="is in memory and was closed, so that its spectra"):
            use()


def test_a_database_in_a_file_is_opened_again_after_it_was_closed(tmp_path: Path) -> None:
    with SpectrumStore(f"sqlite:///{tmp_path / 'ttp.db'}") as store:
        store.put(spectrum())
    assert len(store.list()) == 1


SECRETS = ("hunter2", "hun%74er2", "ter2", "s3cr3t")


@pytest.mark.parametrize(
    "bad_url",
    [
        "sqlite:////no/such/folder/ttp.db",
        "sqlite:////proc",
        "sqlite://user:hunter2@host/ttp.db",
        "unknown://user:hunter2@host/db",
        "unknown+driver://user:hunter2@host/db",
        "postgresql+unknown://user:hunter2@host/db",
        "postgresql+://user:hunter2@host/db",
        "postgresql://user:hunter2@host:port/db",
        "postgresql://user:hunter2@host:99999999/db",
        "postgresql://user:hun@ter2@host/db",
        "postgresql://user:hun@te/ter2@host/db",
        "postgresql://user:hun@te?ter2@host/db",
        "postgresql://user:hunter2",
        "postgresql//user:hunter2@host/db",
        "postgresql://host/db?user=me&password=hunter2",
        "postgresql://user:hun%74er2@host/db",
        "mysql+unknown://user:hunter2@host/db",
        "mysql://host/db?ssl_key=s3cr3t",
        "sqlite:///x.db?timeout=hunter2",
        "hunter2",
        "",
    ],
)
def test_url_that_cannot_be_opened_is_refused_without_its_secrets(
    bad_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreError, match=r"Could not open the store|must look like") as caught:
        SpectrumStore(bad_url)
    shown = str(caught.value) + repr(caught.value) + caplog.text
    assert not [secret for secret in SECRETS if secret in shown]
    assert caught.value.__suppress_context__
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad_url", [5, b"sqlite://", Path("ttp.db"), ["sqlite://"]], ids=str)
def test_what_is_no_url_is_refused(bad_url: Any) -> None:
    with pytest.raises(StoreError, match=r"must look like 'sqlite:///ttp.db'"):
        SpectrumStore(bad_url)


def test_folder_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Could not open the store"):
        SpectrumStore(f"sqlite:///{tmp_path}")
    (tmp_path / "text").write_text("This is no database. " * 100)
    with pytest.raises(StoreError, match="not a database"):
        SpectrumStore(f"sqlite:///{tmp_path / 'text'}")
    assert (tmp_path / "text").read_text() == "This is no database. " * 100


def test_repr_hides_secrets() -> None:
    with pytest.warns(sa.exc.SAWarning, match="not accepted"):
        store = SpectrumStore(sa.URL.create("sqlite", query={"password": "hunter2"}))
    assert repr(store) == "SpectrumStore('sqlite://')"


def test_database_that_breaks_later_gives_a_store_error(url: str) -> None:
    store = SpectrumStore(url)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("DROP TABLE ttp_spectra")
    connection.close()
    fingerprint = spectrum().metadata.fingerprint
    actions: dict[str, Callable[[], object]] = {
        "read": lambda: store.get(fingerprint),
        "write": lambda: store.put(spectrum()),
    }
    for verb, action in actions.items():
        with pytest.raises(StoreError, match=f"Could not {verb} the store.*no such table"):
            action()
    with pytest.raises(StoreError, match="Could not read the store"):
        store.list()
    with pytest.raises(StoreError, match="Could not write the store"):
        store.delete(fingerprint)


def test_who_may_only_read_can_read(postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    store, _ = fill(url, "a")
    database = sa.make_url(url).database
    postgresql.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    reader = SpectrumStore(url)
    assert reader.get(named("a").metadata.fingerprint, dtype="float64") is not None
    with pytest.raises(StoreError, match=r"Could not write the store.*read-only"):
        reader.put(named("b"), dtype="float64")
    assert names_of(store) == "a"


def test_a_store_is_a_context_that_closes_its_connections(postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    with SpectrumStore(url) as store:
        store.put(spectrum())
    # A database that somebody is connected to cannot be renamed.
    name = sa.make_url(url).database
    postgresql.execute(f"ALTER DATABASE {name} RENAME TO {name}_renamed")
    postgresql.execute(f"ALTER DATABASE {name}_renamed RENAME TO {name}")
    assert len(store.list()) == 1
    store.close()
    with pytest.raises(ArithmeticError), store:
        raise ArithmeticError
