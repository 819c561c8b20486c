"""Brings a database to the schema of this version, once, whichever process comes first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import logging
from pathlib import Path

import sqlalchemy as sa

from optuna_ttp._util.exceptions import StoreError
from optuna_ttp._util.exceptions import StoreVersionError
from optuna_ttp.store._rules import RULES
from optuna_ttp.store._schema import HEAD
from optuna_ttp.store._schema import spectra
from optuna_ttp.store._schema import VERSION_TABLE


MIGRATIONS = Path(__file__).parent / "migrations"
"""The folder that Alembic reads the revisions from."""
_version = sa.table(VERSION_TABLE, sa.column("version_num", sa.String(32)))
# A number that no other program locks: the first bytes of "optuna_ttp".
_ADVISORY_LOCK = 0x6F7074756E615F74


def migrate(engine: sa.Engine) -> None:
    """Make the tables, or upgrade those of an older version to the schema of this version.

    Processes that come at once wait for each other; a database that is up to date is not locked.
    Raises StoreVersionError if the database has a version that this package does not know.
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
    """Return the schema's revision in the database, or None if there is none yet.

    Tables without a revision are those of a migration that was killed (on MySQL, which commits
    each of them), or of a time before revisions, for which StoreVersionError is raised.
    """
    inspector = sa.inspect(connection)
    present = set(inspector.get_table_names())
    if VERSION_TABLE in present:
        revision = connection.execute(sa.select(_version.c.version_num)).scalar()
        if revision is not None:
            return str(revision)
    if spectra.name in present:
        columns = {column["name"] for column in inspector.get_columns(spectra.name)}
        if not columns >= set(spectra.c.keys()):
            raise _unknown_version("tables of no version")
    return None


def _unknown_version(current: str) -> StoreVersionError:
    """Return the error for a database whose revision, ``current``, this package does not know."""
    return StoreVersionError(
        f"The store must have a schema up to {HEAD} but got {current}: another version of "
        "optuna_ttp made it. Update optuna_ttp on this machine, or give the URL of another "
        "database to compute the spectra anew."
    )


def _upgrade(connection: sa.Connection, current: str | None) -> None:
    """Run all revisions after the current one in the connection's transaction."""
    # Alembic takes a moment to import, and an up-to-date store does without it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config(attributes={"connection": connection})
    # Alembic reads "%" as the start of a variable.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise _unknown_version(current)
    command.upgrade(config, "head")


@contextmanager
def _locked(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Yield a connection in a transaction; until it ends, other processes cannot migrate."""
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
    """Hold a named lock of MySQL, because a transaction ends there with each change of a table."""
    name = sa.func.concat("optuna_ttp.", sa.func.database())
    if not connection.execute(sa.select(sa.func.get_lock(name, RULES.lock_seconds))).scalar():
        raise StoreError(
            f"Another process has been changing the store's tables for {RULES.lock_seconds} s. "
            "Open the store again once it has finished, or end that process."
        )
    try:
        yield
    finally:
        connection.execute(sa.select(sa.func.release_lock(name)))
