"""A database behind a URL: how it is opened, its transactions and its errors."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import random
import time
from typing import Any
from typing import TypeVar

from optuna.logging import get_logger
import platformdirs
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.engine import URL

from optuna_ttp._util.exceptions import StoreError
from optuna_ttp._util.exceptions import StoreVersionError
from optuna_ttp.store._migrate import migrate
from optuna_ttp.store._rules import RULES


_logger = get_logger("optuna.ttp.store")
_Result = TypeVar("_Result")

# The error of a server that cannot be reached has no code, only a text.
_PASSING_FAILURES = (
    "Connection refused",
    "closed the connection",
    "not yet accepting connections",
    "reset by peer",
    "shutting down",
    "starting up",
)
# Codes of deadlocks, serialisation failures and shutdowns: the transaction is to be repeated.
_POSTGRESQL_AGAIN = ("40001", "40P01", "57P01", "57P02", "57P03")
_MYSQL_AGAIN = (1205, 1213)


class Database:
    """Transactions in any database that SQLAlchemy reaches, by default a SQLite file.

    A transaction is a function of a connection. It is called again after a lost connection or a
    deadlock, so it must do the same when it is called twice. No error shows a password.
    """

    def __init__(self, url: str | URL | None = None) -> None:
        try:
            self._url = make_url(_default_url() if url is None else url)
            if self._url.get_backend_name() != "sqlite" and "@" in (
                f"{self._url.host}{self._url.database}{self._url.query}"
            ):
                raise ValueError("Part of a password was taken for something else.")
        except (sa.exc.ArgumentError, ValueError):
            # The text may hold a password: neither the text nor the cause is repeated.
            raise StoreError(
                "The store's URL must look like 'sqlite:///ttp.db' or "
                "'postgresql://user:password@host/database' (with '@' in a password written as "
                "%40) but could not be read."
            ) from None
        self._engine = self._open()
        self._is_lost = False
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._url = state["_url"]
        self._engine = self._open()
        self._is_lost = False
        self._process = os.getpid()

    @property
    def shown(self) -> str:
        """The URL without password and query."""
        # Some drivers take a password in the query, too.
        return self._url.set(query={}).render_as_string(hide_password=True)

    def read(self, work: Callable[[sa.Connection], _Result]) -> _Result:
        """Return ``work(connection)``, in a transaction that sees one state of the database.

        Raises StoreError if the database fails.
        """
        return self._do("read", work, {"isolation_level": "REPEATABLE READ"})

    def write(
        self, work: Callable[[sa.Connection], _Result], *, patience: float = RULES.patience_seconds
    ) -> _Result:
        """Return ``work(connection)``, in a transaction that happens as a whole or not at all.

        A lost connection is opened again for ``patience`` seconds. Raises StoreError if the
        database fails, IntegrityError if another transaction was first to write a row.
        """
        return self._do("write", work, {"ttp_write": True}, patience)

    def close(self) -> None:
        """Close all connections. A later transaction opens new ones, unless all was in memory."""
        self._engine.dispose()
        self._is_lost = self._url.get_backend_name() == "sqlite" and _is_in_memory(self._url)

    def vacuum(self) -> None:
        """Shrink a SQLite file by the space of deleted rows; other databases reuse it themselves.

        If another process is using the file, nothing happens but a log message.
        """
        if self._engine.dialect.name != "sqlite":
            return
        try:
            with self._engine.connect().execution_options(ttp_plain=True) as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout=1000")
                connection.exec_driver_sql("VACUUM")
        except sa.exc.OperationalError as error:
            _logger.info(f"The space is given back another time: {error.orig}")

    def _do(
        self,
        verb: str,
        work: Callable[[sa.Connection], _Result],
        options: dict[str, Any],
        patience: float = RULES.patience_seconds,
    ) -> _Result:
        """Run ``work`` in a transaction; repeat it for ``patience`` seconds if errors may pass.

        ``verb`` says in the StoreError what failed.
        """
        if self._is_lost:
            raise StoreError(
                f"Could not {verb} the store {self.shown}: it is in memory and was closed, so "
                "that its spectra are gone. Use it inside its with block, or give a file's URL."
            )
        if self._engine.dialect.name == "sqlite":
            # SQLite does not know this level; its transactions always see one state.
            options = {k: v for k, v in options.items() if k != "isolation_level"}
        if self._process != os.getpid():
            # After a fork, the connections are the parent's: neither to be used nor closed here.
            self._engine.dispose(close=False)
            self._process = os.getpid()
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                with self._engine.connect() as connection:
                    connection = connection.execution_options(**options)
                    with connection.begin():
                        return work(connection)
            except sa.exc.IntegrityError:
                raise
            except sa.exc.SQLAlchemyError as error:
                if not self._may_pass(error) or time.monotonic() > deadline:
                    raise self._failure(verb, error) from None
                _logger.debug(f"Trying again: {self._failure(verb, error)}")
            # Pauses are random, so that two transactions that collided do not do so again.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 2.0)

    def _may_pass(self, error: sa.exc.SQLAlchemyError) -> bool:
        """Return True for a lost connection, no server or a deadlock; never for SQLite locks."""
        if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
            return True
        original = getattr(error, "orig", None)
        if self._engine.dialect.name == "postgresql":
            code = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
            # Without a code it was not the server that refused: none could be reached.
            unreached = code is None and isinstance(error, sa.exc.OperationalError)
            return unreached or code in _POSTGRESQL_AGAIN
        if self._engine.dialect.name in ("mysql", "mariadb"):
            number = next(iter(getattr(original, "args", ())), None)
            # 2002 and 2003 mean that the server is not there, perhaps not yet.
            return number in (*_MYSQL_AGAIN, 1053, 2002, 2003, 2006, 2013, 2055)
        return False

    def _open(self) -> sa.Engine:
        """Return the database's engine, with its tables made or upgraded, or raise StoreError."""
        is_sqlite = self._url.get_backend_name() == "sqlite"
        try:
            engine = sa.create_engine(self._url, **_engine_arguments(self._url, is_sqlite))
            if is_sqlite:
                _make_private_file(self._url)
                _prepare_sqlite(engine)
            _migrate_patiently(engine)
        except StoreVersionError as error:
            raise StoreVersionError(f"{self.shown}: {error}") from None
        except (sa.exc.SQLAlchemyError, ImportError, OSError, TypeError, ValueError) as error:
            raise self._failure("open", error) from None
        return engine

    def _failure(self, verb: str, error: Exception) -> StoreError:
        """Return a StoreError, one line without secrets: "Could not {verb} the store ..."."""
        reason = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        for secret in (self._url.password, *self._url.query.values()):
            if secret:
                reason = reason.replace(str(secret), "***")
        if isinstance(error, ModuleNotFoundError):
            reason += ". Install the database's driver"
        return StoreError(f"Could not {verb} the store {self.shown}: {reason}.")


def _migrate_patiently(engine: sa.Engine) -> None:
    """Bring the tables up to date, retrying for a while if a server restarts."""
    deadline = time.monotonic() + RULES.opening_patience_seconds
    while True:
        try:
            return migrate(engine)
        except sa.exc.DBAPIError as error:
            # A wrong password is reported at once; a server that restarts is waited for.
            is_passing = error.connection_invalidated or any(
                text in str(error.orig) for text in _PASSING_FAILURES
            )
            if not is_passing or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _engine_arguments(url: URL, is_sqlite: bool) -> dict[str, Any]:
    """Return the arguments of SQLAlchemy's engine: how connections are pooled and checked."""
    if not is_sqlite:
        # A server that was restarted does not know the pooled connections any more.
        return {"pool_pre_ping": True}
    arguments: dict[str, Any] = {"connect_args": {"timeout": RULES.busy_seconds}}
    if not _is_in_memory(url):
        # SQLite's locks do not survive a fork: no connection is to be open when one happens.
        return {**arguments, "poolclass": sa.NullPool}
    # All threads must see the same database, which lives as long as its only connection.
    arguments["connect_args"]["check_same_thread"] = False
    pool = {"poolclass": sa.QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 3600}
    return {**arguments, **pool}


def _prepare_sqlite(engine: sa.Engine) -> None:
    """Make transactions begin when SQLAlchemy begins them, and readers not wait for writers."""

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, record: object) -> None:
        # Python's driver would begin transactions late, and not for every statement.
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("ttp_plain"):
            # Reading first and writing later would fail if another process wrote in between.
            writes = options.get("ttp_write")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    with engine.connect().execution_options(ttp_plain=True) as connection:
        try:
            # The mode stays with the file, but cannot change while another process reads.
            connection.exec_driver_sql("PRAGMA busy_timeout=100")
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except sa.exc.OperationalError as error:
            # With the default journal readers wait for writers, but it works as well.
            _logger.debug(f"The journal stays as it is: {error.orig}")
        connection.exec_driver_sql(f"PRAGMA busy_timeout={1000 * RULES.busy_seconds}")


def _default_url() -> str:
    """Return the URL of a SQLite file in the user's cache folder, which is made if missing."""
    folder = Path(platformdirs.user_cache_dir("optuna_ttp", appauthor=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"Could not make the cache folder {folder}: {error}") from error
    return f"sqlite:///{folder / 'spectra.db'}"


def _is_in_memory(url: URL) -> bool:
    return url.database in (None, "", ":memory:") or "mode=memory" in str(url)


def _make_private_file(url: URL) -> None:
    """Create the SQLite file, if it is missing, readable and writable by its owner alone."""
    if _is_in_memory(url) or str(url.database).startswith("file:"):
        return
    try:
        os.close(os.open(str(url.database), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except OSError:
        # It is there already, or cannot be made, and then opening it raises an error.
        return
