"""What was learned of a task, by several workers at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
import threading
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from optuna_ttp import LearnedConflictError
from optuna_ttp import StoreError
from optuna_ttp.store import SpectrumStore


def test_learned_values_come_back_with_their_version(any_url: str) -> None:
    store = SpectrumStore(any_url)
    payload = {"trials": [[1, 0.5], [2, None]], "name": "Über"}
    assert store.get_learned("f" * 64, "observations") is None
    assert store.put_learned("f" * 64, "observations", payload) == 1
    loaded = store.get_learned("f" * 64, "observations")
    assert loaded is not None
    assert (loaded.payload, loaded.version) == (payload, 1)
    assert loaded.updated_at.startswith("20")
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
    loaded = store.get_learned("f" * 64, "observations")
    assert loaded is not None
    assert loaded.payload == "second"


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
    loaded = SpectrumStore(any_url).get_learned("f" * 64, "seen")
    assert loaded is not None
    assert sorted(loaded.payload) == [[w, i] for w in range(4) for i in range(8)]
    assert loaded.version == 32


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
