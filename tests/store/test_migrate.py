"""The versions of the tables: how they are made, changed and refused."""

from __future__ import annotations

from pathlib import Path
import shutil
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
import numpy as np
import optuna
import pytest
import sqlalchemy as sa

from optuna_ttp import StoreVersionError
from optuna_ttp.store import _migrate
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._schema import chunks
from optuna_ttp.store._schema import HEAD
from optuna_ttp.store._schema import metadata
from optuna_ttp.store._schema import spectra
from optuna_ttp.store._schema import VERSION_TABLE
from tests import faults
from tests.cases import spectrum


_RECORDED = Path(__file__).parents[1] / "data" / "store_version_1.sqlite"
# A version 2 that no release has: it adds a column and fills it.
_VERSION_2 = """
from alembic import op
import sqlalchemy as sa

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None


def upgrade():
    spectra = sa.table("ttp_spectra", sa.column("name", sa.String), sa.column("note", sa.String))
    if "note" not in {c["name"] for c in sa.inspect(op.get_bind()).get_columns("ttp_spectra")}:
        note = sa.Column("note", sa.String(300), nullable=False, server_default="")
        op.add_column("ttp_spectra", note)
    op.execute(sa.update(spectra).values(note=sa.literal("a note on ") + spectra.c.name))
"""


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """A store of version 1 with three spectra, a learned value and a checkpoint."""
    return f"sqlite:///{shutil.copy(_RECORDED, tmp_path / 'recorded.db')}"


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    """The folder of migrations as a version 2 would have it."""
    folder = tmp_path / "50% migrations"
    shutil.copytree(_migrate.MIGRATIONS, folder)
    (folder / "versions" / "0002_made_up.py").write_text(_VERSION_2)
    return folder


def _use(patch: pytest.MonkeyPatch, version_2: Path) -> None:
    patch.setattr(_migrate, "MIGRATIONS", version_2)
    patch.setattr(_migrate, "HEAD", "0002")


def _execute(url: str, statement: str) -> list[Any]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(sa.text(statement))
        rows = list(result) if result.returns_rows else []
    engine.dispose()
    return rows


def _columns(url: str) -> set[str]:
    engine = sa.create_engine(url)
    names = {column["name"] for column in sa.inspect(engine).get_columns("ttp_spectra")}
    engine.dispose()
    return names


def _notes(url: str) -> set[str]:
    return {row.note for row in _execute(url, "SELECT note FROM ttp_spectra")}


# Version 1


def test_a_recorded_store_is_read(recorded: str) -> None:
    store = SpectrumStore(recorded)
    listed = store.list()
    assert sorted((s.rank, s.name, s.n_samples, s.n_outputs) for s in listed) == [
        (2, "Linear", 8, 3),
        (21, "Linear", 8, 3),
        (21, "Linear", 8, 3),
    ]
    for stored in listed:
        one = store.get(stored.fingerprint, **stored.settings)
        assert one is not None
        assert one.rank == stored.rank
        assert one.metadata.fingerprint == stored.fingerprint
        today = spectrum("mse" if one.loss.kind == "mse" else "cross_entropy", n_samples=8)
        # The recorded one is of another processor, whose single precision rounds otherwise.
        np.testing.assert_allclose(one.eigenvalues, today.eigenvalues[: one.rank], rtol=1e-5)
        np.testing.assert_allclose(one.initial_outputs, today.initial_outputs, rtol=1e-5)
        assert one.loss == today.loss
        assert one.probe is not None
    learned = store.get_learned("f" * 64, "observations")
    assert learned is not None
    assert (learned.payload, learned.version) == ([1, 2, 3], 1)
    block = store.checkpoint("c" * 64).load_block("gram/0")
    np.testing.assert_array_equal(block, np.eye(3))
    assert store.verify().is_clean


def test_damage_in_a_recorded_store_is_noticed(recorded: str) -> None:
    engine = sa.create_engine(recorded)
    with engine.begin() as connection:
        for row in list(connection.execute(sa.select(chunks).where(chunks.c.position == 1))):
            damaged = bytearray(row.data)
            damaged[len(damaged) // 2] ^= 1
            change = sa.update(chunks).where(chunks.c.blob == row.blob, chunks.c.position == 1)
            connection.execute(change.values(data=bytes(damaged)))
    engine.dispose()
    assert len(SpectrumStore(recorded).verify().damaged) == 3


def test_the_migrated_tables_are_those_of_the_schema(any_url: str, recorded: str) -> None:
    for url in (any_url, recorded):
        SpectrumStore(url)
        engine = sa.create_engine(url)
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection,
                opts={
                    "version_table": VERSION_TABLE,
                    "compare_type": connection.dialect.name != "mysql",
                },
            )
            assert context.get_current_revision() == HEAD
            assert compare_metadata(context, metadata) == []
        engine.dispose()


def test_tables_of_a_creation_that_was_killed_are_completed(any_url: str) -> None:
    """MySQL commits every table on its own, and none of them tells a version."""
    engine = sa.create_engine(any_url)
    metadata.create_all(engine, tables=[spectra, chunks])
    engine.dispose()
    store = SpectrumStore(any_url)
    store.put(spectrum())
    store.put_learned("f" * 64, "observations", 1)
    assert store.verify().is_clean


def test_a_creation_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'ttp.db'}"
    with monkeypatch.context() as patch:
        _fail_at(patch, "CREATE TABLE ttp_learned")
        with pytest.raises(Exception, match="plug was pulled"):
            SpectrumStore(url)
    assert _execute(url, "SELECT name FROM sqlite_master WHERE type = 'table'") == []
    SpectrumStore(url).put(spectrum())


@pytest.mark.slow
def test_processes_make_the_tables_once(any_url: str) -> None:
    assert faults.at_once(3, faults.open_and_count, any_url) == [0] * 3
    assert len(_execute(any_url, f"SELECT * FROM {VERSION_TABLE}")) == 1


@pytest.mark.parametrize("studies_first", [True, False])
def test_the_tables_of_a_study_are_not_touched(any_url: str, studies_first: bool) -> None:
    def tables() -> set[str]:
        engine = sa.create_engine(any_url)
        names = set(sa.inspect(engine).get_table_names())
        engine.dispose()
        return names

    if not studies_first:
        SpectrumStore(any_url).put(spectrum())
    study = optuna.create_study(storage=any_url, study_name="mine")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    before = tables()
    revision = _execute(any_url, "SELECT version_num FROM alembic_version")
    SpectrumStore(any_url).put(spectrum())
    new = tables() - before
    assert all(name.startswith("ttp_") for name in new)
    assert bool(new) == studies_first
    assert _execute(any_url, "SELECT version_num FROM alembic_version") == revision
    assert len(optuna.load_study(study_name="mine", storage=any_url).trials) == 2
    assert SpectrumStore(any_url).get(spectrum().metadata.fingerprint) is not None


# Unknown versions


@pytest.mark.parametrize("version", ["0000", "0002", "0042"])
def test_a_store_of_an_unknown_version_is_refused(any_url: str, version: str) -> None:
    SpectrumStore(any_url).put(spectrum())
    _execute(any_url, f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")
    message = rf"up to 0001 but got {version}.*Update optuna_ttp.*or give the URL of another"
    with pytest.raises(StoreVersionError, match=message):
        SpectrumStore(any_url)
    _execute(any_url, f"UPDATE {VERSION_TABLE} SET version_num = '{HEAD}'")
    assert SpectrumStore(any_url).verify().n_checked == 1


def test_foreign_tables_of_our_name_are_refused(any_url: str) -> None:
    _execute(any_url, "CREATE TABLE ttp_spectra (fingerprint VARCHAR(64), data VARCHAR(64))")
    with pytest.raises(StoreVersionError, match=r"up to 0001 but got tables of no version"):
        SpectrumStore(any_url)
    assert _columns(any_url) == {"fingerprint", "data"}


# A made-up version 2


def test_a_store_is_migrated_with_its_rows(
    any_url: str, recorded: str, version_2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (any_url, recorded):
        before = SpectrumStore(url)
        before.put(spectrum())
        n_spectra = len(before.list())
        with monkeypatch.context() as patch:
            _use(patch, version_2)
            store = SpectrumStore(url)
            assert _notes(url) == {"a note on Linear"}
            assert store.verify().is_clean
            assert store.get(spectrum().metadata.fingerprint) is not None
            assert len(SpectrumStore(url).list()) == n_spectra
        with pytest.raises(StoreVersionError, match=r"up to 0001 but got 0002.*Update optuna_ttp"):
            SpectrumStore(url)


def test_a_migration_that_fails_changes_nothing_and_can_be_done_again(
    any_url: str, version_2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SpectrumStore(any_url).put(spectrum())
    before = _columns(any_url)
    with monkeypatch.context() as patch:
        _use(patch, version_2)
        _fail_at(patch, "UPDATE ttp_spectra")
        with pytest.raises(Exception, match="plug was pulled"):
            SpectrumStore(any_url)
    assert _execute(any_url, f"SELECT version_num FROM {VERSION_TABLE}") == [(HEAD,)]
    if not any_url.startswith("mysql"):
        assert _columns(any_url) == before
    assert len(SpectrumStore(any_url).list()) == 1
    _use(monkeypatch, version_2)
    assert SpectrumStore(any_url).verify().is_clean
    assert _notes(any_url) == {"a note on Linear"}


def _fail_at(patch: pytest.MonkeyPatch, beginning: str) -> None:
    """Fail at the first statement that begins so."""

    def fail(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if statement.strip().startswith(beginning):
            raise OSError("The plug was pulled.")

    original = sa.create_engine

    def create(*arguments: Any, **options: Any) -> sa.Engine:
        engine = original(*arguments, **options)
        sa.event.listen(engine, "before_cursor_execute", fail)
        return engine

    patch.setattr(sa, "create_engine", create)


@pytest.mark.slow
def test_processes_migrate_a_store_once(any_url: str, version_2: Path) -> None:
    SpectrumStore(any_url).put(spectrum())
    assert faults.at_once(3, faults.open_and_count, any_url, version_2) == [1] * 3
    assert _notes(any_url) == {"a note on Linear"}
    assert _execute(any_url, f"SELECT version_num FROM {VERSION_TABLE}") == [("0002",)]
