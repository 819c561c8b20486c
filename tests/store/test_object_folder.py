"""Large arrays in files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
import time
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp import StoreError
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import spectra
from tests.store.examples import named


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_large_arrays_go_to_the_folder(any_url: str, folder: Path) -> None:
    store = SpectrumStore(any_url, object_folder=folder, object_threshold=1000)
    store.put(named("a"), dtype="float64")
    small = named("b").truncate(rank=1)
    store.put(small, dtype="float64", rank=1)
    assert [s.in_folder for s in sorted(store.list(), key=lambda s: s.name)] == [True, False]
    [file] = _files(folder)
    assert file.parent.name == file.name[:2]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(Spectrum.load(file).eigenvalues, named("a").eigenvalues)
    reader = SpectrumStore(any_url, object_folder=folder)
    for name, settings in (("a", {}), ("b", {"rank": 1})):
        loaded = reader.get(named(name).metadata.fingerprint, dtype="float64", **settings)
        assert loaded is not None
        assert loaded.metadata.name == name
    with pytest.raises(StoreError, match=r"lie in an object folder. Open the store with obj"):
        SpectrumStore(any_url).get(named("a").metadata.fingerprint, dtype="float64")
    assert reader.verify().is_clean


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_is_put_aside(url: str, folder: Path, damage: str) -> None:
    store = SpectrumStore(url, object_folder=folder, object_threshold=0)
    store.put(named("a"), dtype="float64")
    [file] = _files(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    assert len(store.verify().damaged) == 1
    with pytest.warns(DamagedSpectrumWarning, match="is damaged and was put aside"):
        assert store.get(named("a").metadata.fingerprint, dtype="float64") is None
    store.put(named("a"), dtype="float64")
    assert store.get(named("a").metadata.fingerprint, dtype="float64") is not None


def test_a_folder_that_cannot_be_read_is_no_damage(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SpectrumStore(url, object_folder=folder, object_threshold=0)
    store.put(named("a"), dtype="float64")
    fingerprint = named("a").metadata.fingerprint
    # A share that is not mounted, a folder of another name: the team's spectrum is still good.
    elsewhere = SpectrumStore(url, object_folder=tmp_path / "elsewhere")
    for ask in (lambda: elsewhere.get(fingerprint, dtype="float64"), elsewhere.verify):
        with pytest.raises(StoreError, match=r"elsewhere is empty. Mount it, or open the store"):
            ask()

    def refuse(path: Path, *arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(StoreError, match=r"Could not read the folder .*Permission denied"):
            store.get(fingerprint, dtype="float64")
    assert store.get(fingerprint, dtype="float64") is not None
    assert store.verify().is_clean


def test_files_that_no_row_names_are_deleted_when_they_are_old(url: str, folder: Path) -> None:
    store = SpectrumStore(url, object_folder=folder, object_threshold=0)
    for name in "ab":
        store.put(named(name), dtype="float64")
    store.delete(named("a").metadata.fingerprint)
    (folder / "half.partial").write_bytes(b"of a worker that was killed")
    (folder / "notes.txt").write_text("not ours")
    assert store.prune().n_object_bytes == 0
    assert len(_files(folder)) == 4
    for file in _files(folder):
        os.utime(file, (time.time() - 7200,) * 2)
    assert store.prune().n_object_bytes > 27
    assert len(_files(folder)) == 2
    assert (folder / "notes.txt").exists()
    assert store.verify().is_clean


def test_a_row_cannot_name_a_file_outside_the_folder(url: str, folder: Path) -> None:
    store = SpectrumStore(url, object_folder=folder, object_threshold=0)
    store.put(named("a"), dtype="float64")
    named("a").save(folder.parent / "outside")
    forged = sa.update(spectra).values(checksum="../outside")
    Database(url).write(lambda c: c.execute(forged))
    with pytest.warns(DamagedSpectrumWarning, match="impossible name"):
        assert store.get(named("a").metadata.fingerprint, dtype="float64") is None


def test_a_folder_that_cannot_be_made_is_an_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Could not make the folder"):
        SpectrumStore(url, object_folder=tmp_path / "file")
