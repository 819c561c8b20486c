"""The command that lists, checks and cleans the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from optuna_ttp import DamagedSpectrumWarning
from optuna_ttp.cli import main
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import spectra
from tests.store.examples import fill
from tests.store.examples import named
from tests.store.examples import names_of


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ttp.db'}"


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
    store, _ = fill(url, "ab")
    key = {s.name: s.key for s in store.list()}["a"]
    change = sa.update(spectra).where(spectra.c.key == key).values({column: value})
    Database(url).write(lambda c: c.execute(change))
    assert list(store.verify().damaged) == [key]
    if column in ("rank", "n_samples"):
        assert names_of(store) == "ab"
    else:
        with pytest.warns(DamagedSpectrumWarning, match="left out of the list.*verify --put-as"):
            assert names_of(store) == "b"
    with pytest.warns(DamagedSpectrumWarning, match="was put aside"):
        assert store.get(named("a").metadata.fingerprint, dtype="float64") is None
    assert names_of(store) == "b"
    text = command("verify")[1]
    assert "1 spectrum read; 0 of them damaged" in text
    assert "1 damaged spectra that were put aside" in text


def test_list_and_show(url: str, command: Any) -> None:
    assert command("list") == (0, "The store is empty.\n")
    store, _ = fill(url, "ab")
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
    fill(url, "ab")
    assert command("verify") == (0, "2 spectra read; all of them are as they were written.\n")
    Database(url).write(
        lambda c: c.execute(sa.update(spectra).where(spectra.c.name == "a").values(checksum="0"))
    )
    status, text = command("verify")
    assert status == 1
    assert "checksum does not match" in text
    status, text = command("verify", "--put-aside")
    assert status == 1
    assert names_of(SpectrumStore(url)) == "b"
    assert command("prune")[0] == 0
    assert command("verify")[0] == 0


def test_prune_takes_sizes(url: str, command: Any) -> None:
    store, n_bytes = fill(url, "abc")
    status, text = command("prune", "--max-size", f"{2.5 * n_bytes / 1024}K")
    assert status == 0
    assert "1 spectrum above the size limit" in text
    assert names_of(store) == "bc"
    with pytest.raises(SystemExit) as stop:
        command("prune", "--max-size", "many")
    assert stop.value.code == 2


def test_export_and_import(url: str, command: Any, tmp_path: Path) -> None:
    store, _ = fill(url, "a")
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
    fill(url, "a")
    status, text = command("export", "", path)
    assert status == 1
    assert "Is a directory" in text
    assert list((tmp_path / "folder").iterdir()) == []


def test_show_tells_the_rank_of_what_is_not_truncated(url: str, command: Any) -> None:
    store, _ = fill(url, "a")
    assert f"\nrank: {store.list()[0].rank}\n" in command("show", "")[1]


def test_the_command_shows_no_password(command: Any) -> None:
    status, text = command("--url", "unknown://user:hunter2@host/db", "list")
    assert status == 1
    assert "hunter2" not in text
