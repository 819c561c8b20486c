"""Blocks of unfinished computations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import random

import numpy as np
import pytest
import sqlalchemy as sa

from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp.store import SpectrumStore
from tests.cases import spectrum


def test_blocks_stay_until_the_spectrum_is_stored(any_url: str) -> None:
    store = SpectrumStore(any_url)
    block = np.arange(12.0).reshape(3, 4).T
    checkpoint = store.checkpoint(spectrum().metadata.fingerprint, dtype="float64")
    assert checkpoint.load_block("gram/0") is None
    checkpoint.save_block("gram/0", block)
    checkpoint.save_block("gram/1", np.zeros((700, 700), dtype=np.float32))
    checkpoint.save_block("gram/1", np.ones((700, 700), dtype=np.float32))
    successor = SpectrumStore(any_url).checkpoint(spectrum().metadata.fingerprint, dtype="float64")
    loaded = successor.load_block("gram/0")
    assert loaded is not None
    np.testing.assert_array_equal(loaded, block)
    newer = successor.load_block("gram/1")
    assert newer is not None
    assert newer.dtype == np.float32
    assert (newer == 1).all()
    other = store.checkpoint(spectrum().metadata.fingerprint)
    assert other.load_block("gram/0") is None
    other.save_block("gram/0", block)
    assert store.verify().is_clean
    assert store.prune().n_checkpoints == 0
    metadata = replace(spectrum().metadata, engine="exact", dtype="float64", seed=None)
    store.put(replace(spectrum(), metadata=metadata), dtype="float64")
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
    loaded = store.checkpoint("f" * 64).load_block("gram/0")
    assert loaded is None or len(set(loaded)) == 1


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
