"""What keeps a store clean and small: verification, eviction, files, the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import errno
import hashlib
import os
from pathlib import Path
import time
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from optuna_ttp import DamagedSpectrumError
from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp import StoreError
from optuna_ttp.cli import main
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import _lease
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import checkpoints
from optuna_ttp.store._schema import spectra
from tests.cases import spectrum
from tests.servers import PostgreSQL


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ttp.db'}"


def _named(name: str) -> Spectrum:
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    metadata = replace(spectrum().metadata, name=name, fingerprint=fingerprint)
    return replace(spectrum(), metadata=metadata)


def _fill(url: str, names: str) -> tuple[SpectrumStore, int]:
    """Store spectra of one size, last used in the order of their names; the size, too."""
    store = SpectrumStore(url)
    for name in names:
        store.put(_named(name), dtype="float64")

    def use(connection: sa.Connection) -> None:
        for moment, name in enumerate(names, 1):
            named = sa.update(spectra).where(spectra.c.name == name)
            connection.execute(named.values(used_at=float(moment)))

    Database(url).write(use)
    sizes = {stored.n_bytes for stored in store.list()}
    return store, max(sizes)


def _names(store: SpectrumStore) -> str:
    return "".join(sorted(stored.name for stored in store.list()))


# Eviction


def test_the_least_recently_used_make_way(any_url: str) -> None:
    store, size = _fill(any_url, "abcd")
    # Reading is using.
    assert store.get(_named("a").metadata.fingerprint, dtype="float64") is not None
    assert store.prune(max_bytes=4 * size).n_evicted == 0
    pruning = store.prune(max_bytes=2 * size)
    assert pruning.n_evicted == 2
    assert pruning.n_bytes_left <= 2 * size
    assert _names(store) == "ad"
    assert store.verify().is_clean
    assert store.prune(max_bytes=0).n_bytes_left == 0


def test_what_somebody_works_on_is_not_evicted(any_url: str) -> None:
    store, _ = _fill(any_url, "abc")
    [key] = [stored.key for stored in store.list() if stored.name == "a"]
    lease = _lease.acquire(Database(any_url), key, 60.0)
    assert lease is not None
    assert store.prune(max_bytes=0).n_evicted == 2
    assert _names(store) == "a"
    with lease:
        pass
    assert store.prune(max_bytes=0).n_evicted == 1


def test_a_store_with_a_limit_keeps_to_it(any_url: str) -> None:
    _, size = _fill(any_url, "abc")
    store = SpectrumStore(any_url, max_bytes=2 * size + size // 2)
    store.put(_named("d"), dtype="float64")
    assert _names(store) == "cd"
    # The newest stays even where it alone is too large.
    SpectrumStore(any_url, max_bytes=0).put(_named("e"), dtype="float64")
    assert _names(store) == "e"
    assert store.verify().is_clean


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes must be nonnegative but got -1"):
        SpectrumStore("sqlite://", max_bytes=-1)
    with pytest.raises(ValueError, match="object_threshold must be nonnegative but got -1"):
        SpectrumStore("sqlite://", object_threshold=-1)


@pytest.mark.parametrize(
    ("limit", "error"), [(-1, ValueError), (float("nan"), ValueError), ("10MB", TypeError)]
)
def test_prune_refuses_a_limit_that_is_none(url: str, limit: Any, error: type[Exception]) -> None:
    store, _ = _fill(url, "ab")
    for ask in (store.prune, lambda max_bytes: SpectrumStore(url, max_bytes=max_bytes)):
        with pytest.raises(error, match=r"max_bytes must be (nonnegative|a number) .*but got"):
            ask(max_bytes=limit)
    assert _names(store) == "ab"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("settings", "{"),
        ("settings", "[]"),
        ("provenance", "nothing"),
        ("used_at", 1e300),
        ("rank", 3),
        ("n_samples", 7),
    ],
)
def test_a_damaged_description_hides_no_other_spectrum(
    url: str, command: Any, column: str, value: Any
) -> None:
    store, _ = _fill(url, "ab")
    key = {s.name: s.key for s in store.list()}["a"]
    change = sa.update(spectra).where(spectra.c.key == key).values({column: value})
    Database(url).write(lambda c: c.execute(change))
    assert list(store.verify().damaged) == [key]
    if column in ("rank", "n_samples"):
        assert _names(store) == "ab"
    else:
        with pytest.warns(DamagedSpectrumWarning, match="left out of the list.*verify --put-as"):
            assert _names(store) == "b"
    with pytest.warns(DamagedSpectrumWarning, match="was put aside"):
        assert store.get(_named("a").metadata.fingerprint, dtype="float64") is None
    assert _names(store) == "b"
    assert command("verify")[1].count("damaged") == 1


def test_prune_deletes_what_is_of_no_use_and_nothing_else(any_url: str) -> None:
    store, _ = _fill(any_url, "ab")
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
    assert _names(store) == "ab"
    assert store.checkpoint("d" * 64).load_block("fresh") is not None
    assert store.verify().is_clean


def test_prune_gives_space_back_unless_somebody_reads(url: str) -> None:
    store, _ = _fill(url, "abcdefgh")
    path = Path(url.removeprefix("sqlite:///"))
    before = path.stat().st_size
    engine = sa.create_engine(url)
    with engine.connect() as reader:
        assert len(reader.execute(sa.text("SELECT * FROM ttp_spectra")).fetchmany(1)) == 1
        assert store.prune(max_bytes=0).n_evicted == 8
    engine.dispose()
    store.put(_named("a"), dtype="float64")
    assert store.prune(max_bytes=0).n_evicted == 1
    assert path.stat().st_size < before


def test_who_may_only_read_can_read(postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    store, _ = _fill(url, "a")
    database = sa.make_url(url).database
    postgresql.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    reader = SpectrumStore(url)
    assert reader.get(_named("a").metadata.fingerprint, dtype="float64") is not None
    with pytest.raises(StoreError, match=r"Could not write the store.*read-only"):
        reader.put(_named("b"), dtype="float64")
    assert _names(store) == "a"


# The object folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_large_arrays_go_to_the_folder(any_url: str, folder: Path) -> None:
    store = SpectrumStore(any_url, object_folder=folder, object_threshold=1000)
    store.put(_named("a"), dtype="float64")
    small = _named("b").truncate(rank=1)
    store.put(small, dtype="float64", rank=1)
    assert [s.in_folder for s in sorted(store.list(), key=lambda s: s.name)] == [True, False]
    [file] = _files(folder)
    assert file.parent.name == file.name[:2]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(Spectrum.load(file).eigenvalues, _named("a").eigenvalues)
    reader = SpectrumStore(any_url, object_folder=folder)
    for name, settings in (("a", {}), ("b", {"rank": 1})):
        found = reader.get(_named(name).metadata.fingerprint, dtype="float64", **settings)
        assert found is not None
        assert found.metadata.name == name
    with pytest.raises(StoreError, match=r"lie in an object folder. Open the store with obj"):
        SpectrumStore(any_url).get(_named("a").metadata.fingerprint, dtype="float64")
    assert reader.verify().is_clean


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_is_put_aside(url: str, folder: Path, damage: str) -> None:
    store = SpectrumStore(url, object_folder=folder, object_threshold=0)
    store.put(_named("a"), dtype="float64")
    [file] = _files(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    assert len(store.verify().damaged) == 1
    with pytest.warns(DamagedSpectrumWarning, match="is damaged and was put aside"):
        assert store.get(_named("a").metadata.fingerprint, dtype="float64") is None
    store.put(_named("a"), dtype="float64")
    assert store.get(_named("a").metadata.fingerprint, dtype="float64") is not None


def test_a_folder_that_cannot_be_read_is_no_damage(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SpectrumStore(url, object_folder=folder, object_threshold=0)
    store.put(_named("a"), dtype="float64")
    fingerprint = _named("a").metadata.fingerprint
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
        store.put(_named(name), dtype="float64")
    store.delete(_named("a").metadata.fingerprint)
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
    store.put(_named("a"), dtype="float64")
    _named("a").save(folder.parent / "outside")
    forged = sa.update(spectra).values(checksum="../outside")
    Database(url).write(lambda c: c.execute(forged))
    with pytest.warns(DamagedSpectrumWarning, match="impossible name"):
        assert store.get(_named("a").metadata.fingerprint, dtype="float64") is None


def test_a_folder_that_cannot_be_made_is_an_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Could not make the folder"):
        SpectrumStore(url, object_folder=tmp_path / "file")


# Files in and out


def test_export_and_import_keep_the_settings(url: str, tmp_path: Path) -> None:
    store = SpectrumStore(url)
    store.put(_named("a").truncate(rank=2), dtype="float64", rank=2)
    [stored] = store.list()
    path = tmp_path / "a.ttp"
    assert store.export_spectrum(stored.key, path) == stored
    assert Spectrum.load(path).rank == 2
    other = SpectrumStore("sqlite://")
    other.import_spectrum(path)
    assert [s.key for s in other.list()] == [stored.key]
    _named("b").save(path)
    other.import_spectrum(path)
    assert other.get(_named("b").metadata.fingerprint, dtype="float64") is not None
    assert len(other.list()) == 2
    with pytest.raises(KeyError):
        store.export_spectrum("0" * 64, path)


def test_a_file_with_foreign_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ttp"
    for note in ({"settings": {"unknown": 1}}, {"settings": {"rank": 1}}, {"settings": 3}):
        path.write_bytes(b"".join(_named("a").to_pieces(note=note)))
        with pytest.raises(DamagedSpectrumError, match="settings do not fit"):
            SpectrumStore("sqlite://").import_spectrum(path)


# The command


@pytest.fixture
def command(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("OPTUNA_TTP_STORE", url)

    def run(*arguments: str) -> tuple[int, str]:
        status = main(["store", *arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_list_and_show(url: str, command: Any) -> None:
    assert command("list") == (0, "The store is empty.\n")
    store, _ = _fill(url, "ab")
    status, text = command("list")
    assert status == 0
    assert text.count("\n") == 4
    [first, _] = store.list()
    assert first.key[:12] in text
    status, text = command("show", first.key[:12])
    assert status == 0
    for shown in (first.key, first.fingerprint, "float64", first.provenance["torch_version"]):
        assert shown in text
    assert command("show", "nothing")[0] == 1
    assert "must name one spectrum but got 2" in command("show", "")[1]


def test_verify_tells_what_is_damaged(url: str, command: Any) -> None:
    _fill(url, "ab")
    assert command("verify") == (0, "2 spectra read; all of them are as they were written.\n")
    Database(url).write(
        lambda c: c.execute(sa.update(spectra).where(spectra.c.name == "a").values(checksum="0"))
    )
    status, text = command("verify")
    assert status == 1
    assert "checksum does not match" in text
    status, text = command("verify", "--put-aside")
    assert status == 1
    assert _names(SpectrumStore(url)) == "b"
    assert command("prune")[0] == 0
    assert command("verify")[0] == 0


def test_prune_takes_sizes(url: str, command: Any) -> None:
    store, size = _fill(url, "abc")
    status, text = command("prune", "--max-size", f"{2.5 * size / 1024}K")
    assert status == 0
    assert "1 spectrum above the size limit" in text
    assert _names(store) == "bc"
    with pytest.raises(SystemExit) as stop:
        command("prune", "--max-size", "many")
    assert stop.value.code == 2


def test_export_and_import(url: str, command: Any, tmp_path: Path) -> None:
    store, _ = _fill(url, "a")
    [stored] = store.list()
    path = str(tmp_path / "a.ttp")
    assert command("export", stored.key[:8], path)[0] == 0
    store.delete(stored.fingerprint)
    assert command("import", path)[0] == 0
    assert [s.key for s in store.list()] == [stored.key]
    status, text = command("import", str(tmp_path / "missing"))
    assert status == 1
    assert "missing" in text
    (tmp_path / "text").write_text("hello")
    status, text = command("import", str(tmp_path / "text"))
    assert status == 1
    assert "no spectrum" in text
    assert str(tmp_path / "text") in text


@pytest.mark.parametrize("path", [".", "folder"])
def test_export_to_a_folder_is_refused(
    url: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    _fill(url, "a")
    status, text = command("export", "", path)
    assert status == 1
    assert "Is a directory" in text
    assert list((tmp_path / "folder").iterdir()) == []


def test_show_tells_the_rank_of_what_is_not_truncated(url: str, command: Any) -> None:
    store, _ = _fill(url, "a")
    assert f"\nrank: {store.list()[0].rank}\n" in command("show", "")[1]


def test_the_command_shows_no_password(command: Any) -> None:
    status, text = command("--url", "unknown://user:hunter2@host/db", "list")
    assert status == 1
    assert "hunter2" not in text
