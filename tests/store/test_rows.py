"""Nothing wrong is handed out."""

from __future__ import annotations

import hashlib
import pickle
import sqlite3
import tracemalloc
from typing import Any

import numpy as np
import pytest

from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp import FingerprintMismatchError
from optuna_ttp.store import SpectrumStore
from tests.cases import spectrum
from tests.store.examples import assert_equal
from tests.store.examples import Counting
from tests.store.examples import QUICK


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
    assert_equal(SpectrumStore(url).get_or_compute(counting.task, **QUICK), again)
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
