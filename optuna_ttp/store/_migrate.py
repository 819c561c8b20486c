"""Brings a database to today's schema, once, whoever comes first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import logging
from pathlib import Path

import sqlalchemy as sa

from optuna_ttp._util.exceptions import StoreError
from optuna_ttp._util.exceptions import StoreVersionError
from optuna_ttp.store._schema import HEAD
from optuna_ttp.store._schema import VERSION_TABLE


_version = sa.table(VERSION_TABLE, sa.column("version_num", sa.String(32)))
# Any number that nobody else takes: the first bytes of "optuna_ttp".
_ADVISORY_LOCK = 0x6F7074756E615F74
_LOCK_SECONDS = 600


def migrate(engine: sa.Engine) -> None:
    """Make the tables, or change older ones to what this version knows.

    Processes that come at once wait for each other; a database that is up to date is not locked.

    Args:
        engine:
            The database.

    Raises:
        StoreVersionError:
            If the database was made by a newer version.
    """
    with engine.connect() as connection:
        if _current(connection) == HEAD:
            return
    with _locked(engine) as connection:
        # Another process may have done it while this one waited.
        current = _current(connection)
        if current != HEAD:
            _upgrade(connection, current)


def _current(connection: sa.Connection) -> str | None:
    """The revision; nothing for an empty database, the first for one from before revisions."""
    present = set(sa.inspect(connection).get_table_names())
    if VERSION_TABLE in present:
        revision = connection.execute(sa.select(_version.c.version_num)).scalar()
        if revision is not None:
            return str(revision)
    return "0001" if "ttp_spectra" in present else None


def _upgrade(connection: sa.Connection, current: str | None) -> None:
    # Alembic takes a moment to import, and an up-to-date store does without it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config(attributes={"connection": connection})
    # Alembic reads "%" as the start of a variable.
    folder = str(Path(__file__).parent / "migrations").replace("%", "%%")
    config.set_main_option("script_location", folder)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise StoreVersionError(
            f"The store must have a schema up to {HEAD} but got {current}: it was made by a newer "
            "version of optuna_ttp. Update optuna_ttp on this machine."
        )
    if current is not None:
        command.stamp(config, current)
    command.upgrade(config, "head")


@contextmanager
def _locked(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that no other process migrates in."""
    dialect = engine.dialect.name
    with engine.connect() as connection:
        if dialect == "sqlite":
            connection = connection.execution_options(ttp_write=True)
        if dialect in ("mysql", "mariadb"):
            with _named_lock(connection):
                yield connection
                connection.commit()
            return
        with connection.begin():
            if dialect == "postgresql":
                lock = sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)
                connection.execute(sa.select(lock))
            yield connection


@contextmanager
def _named_lock(connection: sa.Connection) -> Iterator[None]:
    # MySQL ends a transaction with every change of a table; a named lock outlives it.
    name = sa.func.concat("optuna_ttp.", sa.func.database())
    if not connection.execute(sa.select(sa.func.get_lock(name, _LOCK_SECONDS))).scalar():
        raise StoreError(f"Another process has been changing the store for {_LOCK_SECONDS} s.")
    try:
        yield
    finally:
        connection.execute(sa.select(sa.func.release_lock(name)))
