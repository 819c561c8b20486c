from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import hashlib
import json
import logging
import os
from pathlib import Path
import pickle
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from typing import Any
import uuid

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import torch

from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp import FingerprintMismatchError
from optuna_ttp import StoreError
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask
from tests.cases import spectrum
from tests.models import mlp
from tests.models import vectors


QUICK: dict[str, Any] = {"measure_speed": False, "show_progress_bar": False}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ttp.db'}"


class Counting:
    """A task that counts how often its model runs."""

    def __init__(self, seed: int = 0, name: str | None = None) -> None:
        self.n_calls = 0
        self.task = FineTuningTask(mlp(seed=seed), vectors(5), forward=self._forward, name=name)
        self.n_calls = 0

    @staticmethod
    def _plain(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = model(x)
        return outputs

    @property
    def _forward(self) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
        calls = self

        def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            calls.n_calls += 1
            return Counting._plain(model, x)

        return forward


def _assert_equal(first: Spectrum, second: Spectrum) -> None:
    np.testing.assert_array_equal(first.eigenvalues, second.eigenvalues)
    np.testing.assert_array_equal(first.eigenvectors, second.eigenvectors)
    assert first.metadata == second.metadata


def test_spectrum_is_computed_once(url: str) -> None:
    counting = Counting()
    first = SpectrumStore(url).get_or_compute(counting.task, **QUICK)
    assert counting.n_calls > 0
    counting.n_calls = 0
    _assert_equal(SpectrumStore(url).get_or_compute(counting.task, **QUICK), first)
    again = Counting(name="the same task by another name")
    _assert_equal(SpectrumStore(url).get_or_compute(again.task, **QUICK), first)
    assert (counting.n_calls, again.n_calls) == (0, 0)
    assert len(SpectrumStore(url).list()) == 1


def test_spectrum_is_computed_again_for_other_weights_or_settings(url: str) -> None:
    store = SpectrumStore(url)
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
        _assert_equal(store.get_or_compute(counting.task, **chosen, **QUICK), computed)
        assert counting.n_calls == 0
    with torch.no_grad():
        next(counting.task.model.parameters()).add_(0.1)
    store.get_or_compute(counting.task, **QUICK)
    assert counting.n_calls > 0
    assert len(store.list()) == 6
    assert store.get_or_compute(counting.task, rank=3, **QUICK).rank == 3


def test_a_sketch_is_filed_under_its_seed_and_the_width_that_memory_allows(url: str) -> None:
    task = FineTuningTask(mlp(), vectors(20))
    store = SpectrumStore(url)
    settings: dict[str, Any] = {"engine": "sketch", "measure_speed": False, "probe": False}
    first = store.get_or_compute(task, **settings)
    other = store.get_or_compute(task, seed=1, **settings)
    assert (first.metadata.seed, other.metadata.seed) == (0, 1)
    assert len(store.list()) == 2
    _assert_equal(store.get_or_compute(task, seed=1, **settings), other)
    found = store.get(task, engine="sketch", seed=1)
    assert found is not None
    _assert_equal(found, other)
    # 60 rows of 4096 numbers, twice: no wider sketch fits.
    narrow = store.get_or_compute(task, max_memory=60 * 4096 * 4 * 2, **settings)
    assert len(store.list()) == 3
    assert store.get(task, engine="sketch", max_sketch_width=4096) is not None
    with pytest.raises(ValueError, match="computed with seed=1 but got seed=0"):
        store.put(other, engine="sketch", seed=0)
    with pytest.raises(ValueError, match="The sketch has width 4096"):
        store.put(narrow, engine="sketch", max_sketch_width=2048)
    # What is exact has no seed.
    exact = {**settings, "engine": "exact"}
    for seed in (0, 1):
        store.get_or_compute(task, seed=seed, **exact)
    assert len(store.list()) == 4


def test_where_and_how_fast_it_is_computed_is_no_setting(url: str) -> None:
    store = SpectrumStore(url)
    counting = Counting()
    first = store.get_or_compute(counting.task, **QUICK)
    counting.n_calls = 0
    second = store.get_or_compute(
        counting.task,
        device="cpu",
        max_memory=2**28,
        show_progress_bar=False,
        measure_speed=False,
    )
    assert counting.n_calls == 0
    _assert_equal(first, second)


def test_the_time_of_a_step_is_measured_where_the_stored_spectrum_lacks_it() -> None:
    store = SpectrumStore("sqlite://")
    task = Counting().task
    assert store.get_or_compute(task, **QUICK).throughput is None
    again = store.get_or_compute(task, show_progress_bar=False)
    assert again.throughput is not None
    assert len(store.list()) == 1


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


def test_defaults_and_numpy_numbers_name_the_same_spectrum(url: str) -> None:
    store = SpectrumStore(url)
    task = Counting().task
    spelled: dict[str, Any] = {
        "engine": "exact",
        "dtype": "float32",
        "rank": None,
        "explained_trace": None,
        "seed": 0,
    }
    first = store.get_or_compute(task, **spelled, **QUICK)
    found = store.get(task)
    assert found is not None
    _assert_equal(found, first)
    cut = store.get_or_compute(task, rank=np.int64(3), explained_trace=np.float64(1.0), **QUICK)
    found = store.get(task, rank=3, explained_trace=1)
    assert found is not None
    _assert_equal(found, cut)


def test_get_gives_none_where_there_is_nothing(url: str) -> None:
    store = SpectrumStore(url)
    task = Counting().task
    assert store.get(task) is None
    assert store.get("0" * 64) is None
    store.put(spectrum())
    assert store.get(spectrum().metadata.fingerprint, rank=2) is None


def test_put_keeps_what_is_there(url: str) -> None:
    store = SpectrumStore(url)
    original = spectrum()
    later = replace(original, metadata=replace(original.metadata, name="later"))
    store.put(original)
    store.put(later)
    found = store.get(original.metadata.fingerprint)
    assert found is not None
    _assert_equal(found, original)


@pytest.mark.parametrize("method", ["get", "put"])
def test_unknown_settings_are_refused(url: str, method: str) -> None:
    subject = {"get": spectrum().metadata.fingerprint, "put": spectrum()}[method]
    with pytest.raises(TypeError, match=r"max_sketch_width but got device"):
        getattr(SpectrumStore(url), method)(subject, device="cpu")
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        getattr(SpectrumStore(url), method)(subject, rank=0)


def test_a_misspelt_setting_is_refused_also_where_a_spectrum_is_stored(url: str) -> None:
    store = SpectrumStore(url)
    counting = Counting()
    store.get_or_compute(counting.task, **QUICK)
    with pytest.raises(TypeError, match=r"compute_spectrum takes .*explained_trace.*but got expl"):
        store.get_or_compute(counting.task, **QUICK, explaned_trace=0.9)
    with pytest.raises(TypeError, match=r"compute_spectrum takes .* but got ranc"):
        store.get_or_compute(counting.task, **QUICK, instead_of_waiting={"ranc": 3})
    task: Any = counting.task.fingerprint
    with pytest.raises(TypeError, match="task must be a FineTuningTask but got str"):
        store.get_or_compute(task)


def test_list_and_delete(url: str) -> None:
    store = SpectrumStore(url)
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
    }
    assert (cut.n_samples, cut.n_outputs) == (12, 3)
    assert cut.n_bytes == len(first.truncate(rank=2).to_bytes())
    assert cut.created_at == first.metadata.created_at
    assert cut.compute_seconds == first.metadata.compute_seconds
    assert store.delete(first.metadata.fingerprint) == 2
    assert store.delete(first.metadata.fingerprint) == 0
    assert [s.fingerprint for s in store.list()] == [second.metadata.fingerprint]


def test_delete_by_task(url: str) -> None:
    store = SpectrumStore(url)
    counting = Counting()
    store.get_or_compute(counting.task, **QUICK)
    assert store.delete(counting.task) == 1
    assert store.get(counting.task) is None


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


@pytest.mark.skipif(os.name != "posix", reason="File permissions of POSIX.")
def test_database_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "ttp.db"
    SpectrumStore(f"sqlite:///{path}").put(spectrum())
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="File permissions of POSIX.")
def test_permissions_of_a_file_that_is_there_are_the_users_own(tmp_path: Path) -> None:
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


def test_pickled_store_reads_the_same_database(url: str) -> None:
    store = SpectrumStore(url)
    store.put(spectrum())
    twin = pickle.loads(pickle.dumps(store))
    assert len(twin.list()) == 1


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


_WORKER = """
import sys
from tests.cases import spectrum
from tests.store.test_store import Counting, QUICK
from optuna_ttp.store import SpectrumStore
task = Counting().task
print("ready", flush=True)
sys.stdin.readline()
store = SpectrumStore(sys.argv[1])
for i in range(3):
    store.get_or_compute(task, rank=i + 1, **QUICK)
    store.put(spectrum())
print(len(store.list()))
"""


def test_processes_share_a_database_at_once(url: str) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    # Both are set off together, so that they create the table and the rows at once.
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    assert [worker.communicate()[0].strip() for worker in workers] == ["4", "4"]
    store = SpectrumStore(url)
    assert len(store.list()) == 4
    for i in range(3):
        found = store.get(Counting().task, rank=i + 1)
        assert found is not None
        assert found.rank == i + 1


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


# Nothing wrong is handed out


def _execute(url: str, statement: str, *values: Any) -> None:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        assert connection.execute(statement, values).rowcount > 0
    connection.close()


def _flip(url: str, bit: int) -> None:
    """Flip one bit of a single stored chunk of arrays."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        query = "SELECT rowid, data FROM ttp_chunks ORDER BY length(data) DESC LIMIT 1"
        rowid, data = connection.execute(query).fetchone()
        damaged = bytearray(data)
        damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
        connection.execute("UPDATE ttp_chunks SET data = ? WHERE rowid = ?", (damaged, rowid))
    connection.close()


@pytest.mark.parametrize("bit", [0, 40, 300, 5000])
def test_a_flipped_bit_is_noticed_put_aside_and_computed_again(url: str, bit: int) -> None:
    store = SpectrumStore(url)
    counting = Counting()
    first = store.get_or_compute(counting.task, **QUICK)
    _flip(url, bit)
    assert not store.verify().is_clean
    counting.n_calls = 0
    with pytest.warns(DamagedSpectrumWarning, match=r"is damaged and was put aside: .*checksum|"):
        again = store.get_or_compute(counting.task, **QUICK)
    assert counting.n_calls > 0
    np.testing.assert_array_equal(again.eigenvalues, first.eigenvalues)
    _assert_equal(SpectrumStore(url).get_or_compute(counting.task, **QUICK), again)
    checked = store.verify()
    assert (checked.n_checked, checked.damaged, checked.n_quarantined) == (1, {}, 1)
    assert store.prune().n_quarantined == 1
    assert store.verify().is_clean


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM ttp_chunks WHERE position = 1",
        "UPDATE ttp_chunks SET data = substr(data, 1, 100) WHERE position = 1",
        "UPDATE ttp_chunks SET data = data || data WHERE position = 1",
        "UPDATE ttp_chunks SET data = zeroblob(100000000) WHERE position = 1",
        "UPDATE ttp_chunks SET position = 1000 WHERE position = 1",
        "UPDATE ttp_spectra SET n_bytes = n_bytes + 1",
        "UPDATE ttp_spectra SET checksum = '0'",
    ],
)
def test_rows_that_do_not_fit_are_put_aside(url: str, statement: str) -> None:
    store = SpectrumStore(url)
    store.put(spectrum())
    _execute(url, statement)
    tracemalloc.start()
    with pytest.warns(DamagedSpectrumWarning, match="was put aside"):
        assert store.get(spectrum().metadata.fingerprint) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    assert store.get(spectrum().metadata.fingerprint) is None
    assert store.list() == []


def _replace_data(url: str, data: bytes) -> None:
    """Let a foreign blob stand where a spectrum stood, as someone would who knows the format."""
    _execute(url, "DELETE FROM ttp_chunks WHERE position > 1")
    _execute(url, "DELETE FROM ttp_chunks WHERE position = 1")
    _execute(url, "UPDATE ttp_chunks SET data = ?", data)
    checksum = hashlib.sha256(data).hexdigest()
    _execute(url, "UPDATE ttp_spectra SET checksum = ?, n_bytes = ?", checksum, len(data))


def test_bytes_that_are_no_spectrum_are_put_aside(url: str) -> None:
    store = SpectrumStore(url)
    store.put(spectrum())
    _replace_data(url, pickle.dumps(spectrum()))
    with pytest.warns(DamagedSpectrumWarning, match="These bytes are no spectrum"):
        assert store.get(spectrum().metadata.fingerprint) is None


def test_spectrum_of_another_task_is_refused(url: str) -> None:
    store = SpectrumStore(url)
    counting = Counting()
    store.get_or_compute(counting.task, **QUICK)
    fingerprint = spectrum().metadata.fingerprint
    store.put(spectrum())
    _execute(url, "DELETE FROM ttp_spectra WHERE fingerprint = ?", fingerprint)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        query = "SELECT key, fingerprint FROM ttp_spectra"
        key, _ = connection.execute(query).fetchone()
    connection.close()
    store.put(spectrum())
    _execute(url, "DELETE FROM ttp_spectra WHERE key = ?", key)
    change = "UPDATE ttp_spectra SET key = ?, fingerprint = ?"
    _execute(url, change, key, counting.task.fingerprint)
    with pytest.raises(FingerprintMismatchError, match=r"must belong to the task .* but got one"):
        store.get(counting.task)
    with pytest.raises(FingerprintMismatchError):
        store.get_or_compute(counting.task, **QUICK)
    assert not store.verify().is_clean


def test_failed_computation_stores_nothing(url: str) -> None:
    store = SpectrumStore(url)
    task = FineTuningTask(mlp(), vectors(4), forward=lambda model, x: 0.0 * model(x))
    with pytest.raises(ValueError, match="Jacobian must not be zero"):
        store.get_or_compute(task, **QUICK)
    assert store.list() == []


# What cannot be opened, and secrets


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


def test_list_is_sorted_by_age(url: str) -> None:
    store = SpectrumStore(url)
    for day in (3, 1, 2):
        metadata = replace(
            spectrum().metadata, fingerprint=uuid.uuid4().hex * 2, created_at=f"2030-01-0{day}"
        )
        store.put(replace(spectrum(), metadata=metadata))
    assert [s.created_at[-1] for s in store.list()] == ["1", "2", "3"]
    assert json.dumps([s.settings for s in store.list()])


def test_what_is_no_name_or_number_is_refused_in_words() -> None:
    wrong: Any = torch.float64
    with pytest.raises(TypeError, match=r"dtype must be a name but got torch\.float64"):
        SpectrumStore("sqlite://").get("f" * 64, dtype=wrong)
    seconds: Any = "60"
    with pytest.raises(TypeError, match="lease_seconds must be a number but got '60'"):
        SpectrumStore("sqlite://", lease_seconds=seconds)
