from __future__ import annotations

from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
import numpy as np
import optuna
import pytest
import sqlalchemy as sa

from optuna_ttp import StoreVersionError
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._schema import HEAD
from optuna_ttp.store._schema import metadata
from optuna_ttp.store._schema import VERSION_TABLE
from tests.cases import spectrum


_FIRST = Path(__file__).parents[1] / "data" / "store_schema_1.sqlite"


@pytest.fixture
def first_schema(tmp_path: Path) -> str:
    """A store that the first released schema made, with three spectra."""
    return f"sqlite:///{shutil.copy(_FIRST, tmp_path / 'first.db')}"


def _execute(url: str, statement: str) -> list[Any]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(sa.text(statement))
        rows = list(result) if result.returns_rows else []
    engine.dispose()
    return rows


def test_a_store_of_the_first_schema_opens(first_schema: str) -> None:
    before = {
        row.checksum: row.data
        for row in _execute(first_schema, "SELECT checksum, data FROM ttp_spectra")
    }
    store = SpectrumStore(first_schema)
    listed = store.list()
    assert sorted((s.rank, s.name, s.n_samples, s.n_outputs) for s in listed) == [
        (2, "Linear", 8, 3),
        (21, "Linear", 8, 3),
        (21, "Linear", 8, 3),
    ]
    assert {s.used_at for s in listed} == {None}
    for stored in listed:
        found = store.get(stored.fingerprint, **stored.settings)
        assert found is not None
        assert found.rank == stored.rank
        assert found.metadata.fingerprint == stored.fingerprint
        today = spectrum("mse" if found.loss.kind == "mse" else "cross_entropy", n_samples=8)
        # Of the same kernel, by the processor that wrote them; today's may round otherwise.
        with np.load(_FIRST.with_name("spectrum_format_1.npz")) as written:
            expected = written["eigenvalues"][: found.rank]
        np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-9)
        np.testing.assert_allclose(found.eigenvalues, today.eigenvalues[: found.rank], rtol=1e-5)
    # Byte for byte as they were written.
    for checksum, data in before.items():
        query = (
            "SELECT data FROM ttp_chunks JOIN ttp_spectra ON ttp_spectra.blob = ttp_chunks.blob "
            f"WHERE checksum = '{checksum}' ORDER BY position"
        )
        assert b"".join(row.data for row in _execute(first_schema, query)) == data
    assert all(s.used_at is not None for s in store.list())
    assert store.verify().is_clean


def test_what_is_damaged_in_a_store_of_the_first_schema_is_noticed(first_schema: str) -> None:
    engine = sa.create_engine(first_schema)
    with engine.begin() as connection:
        for key, data in list(connection.execute(sa.text("SELECT key, data FROM ttp_spectra"))):
            damaged = bytearray(data)
            damaged[1000] ^= 1
            change = sa.text("UPDATE ttp_spectra SET data = :data WHERE key = :key")
            connection.execute(change, {"data": bytes(damaged), "key": key})
    engine.dispose()
    assert len(SpectrumStore(first_schema).verify().damaged) == 3


def test_the_migrated_tables_are_those_of_today(any_url: str, first_schema: str) -> None:
    for url in (any_url, first_schema):
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


def test_a_first_store_in_a_server_is_migrated_with_its_rows(
    any_url: str, first_schema: str
) -> None:
    """The first schema made its table in any database; here by the first revision."""
    source = sa.create_engine(first_schema)
    target = sa.create_engine(any_url)
    old = sa.Table("ttp_spectra", sa.MetaData(), autoload_with=source)
    old.c.data.type = sa.LargeBinary().with_variant(sa.LargeBinary(2**32 - 1), "mysql")
    old.metadata.create_all(target)
    with source.connect() as reading, target.begin() as writing:
        rows = [dict(row) for row in reading.execute(sa.select(old)).mappings()]
        writing.execute(old.insert(), rows)
    source.dispose()
    target.dispose()
    store = SpectrumStore(any_url)
    assert sorted(s.rank for s in store.list()) == [2, 21, 21]
    assert store.verify().is_clean


def test_a_store_of_a_newer_version_is_refused(any_url: str) -> None:
    SpectrumStore(any_url).put(spectrum())
    _execute(any_url, f"UPDATE {VERSION_TABLE} SET version_num = '0042'")
    with pytest.raises(StoreVersionError, match=r"up to 0002 but got 0042.*Update optuna_ttp"):
        SpectrumStore(any_url)
    _execute(any_url, f"UPDATE {VERSION_TABLE} SET version_num = '{HEAD}'")
    assert SpectrumStore(any_url).verify().n_checked == 1


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


_OPENER = """
import sys
from optuna_ttp.store import SpectrumStore
print("ready", flush=True)
sys.stdin.readline()
print(len(SpectrumStore(sys.argv[1]).list()))
"""


def _open_at_once(url: str, n: int) -> list[str]:
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", _OPENER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(n)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("\n")
        opener.stdin.flush()
    return [opener.communicate()[0].strip() for opener in openers]


@pytest.mark.slow
def test_processes_migrate_a_first_store_once(first_schema: str) -> None:
    assert _open_at_once(first_schema, 3) == ["3"] * 3
    assert SpectrumStore(first_schema).verify().is_clean


@pytest.mark.slow
def test_processes_make_the_tables_once(any_url: str) -> None:
    assert _open_at_once(any_url, 3) == ["0"] * 3
    assert len(_execute(any_url, f"SELECT * FROM {VERSION_TABLE}")) == 1


def test_a_migration_that_fails_changes_nothing(
    first_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sa.Connection.execute
    executed = 0

    def failing(self: sa.Connection, statement: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal executed
        executed += "INSERT INTO ttp_chunks" in str(statement)
        if executed == 2:
            raise OSError("The plug was pulled.")
        return original(self, statement, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sa.Connection, "execute", failing)
        with pytest.raises(Exception, match="plug was pulled"):
            SpectrumStore(first_schema)
    assert _execute(first_schema, "SELECT name FROM sqlite_master WHERE type = 'table'") == [
        ("ttp_spectra",)
    ]
    rows = _execute(first_schema, "SELECT data FROM ttp_spectra")
    assert len(rows) == 3
    assert all(Spectrum.from_bytes(row.data).rank for row in rows)
    assert len(SpectrumStore(first_schema).list()) == 3
