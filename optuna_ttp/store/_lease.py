"""Leases: rows that record which worker computes which spectrum, timed by the database's clock."""

from __future__ import annotations

from dataclasses import dataclass
import os
import platform
import threading
from types import TracebackType
from uuid import uuid4

from optuna.logging import get_logger
import sqlalchemy as sa

from optuna_ttp._util.exceptions import StoreError
from optuna_ttp.store._database import Database
from optuna_ttp.store._rules import RULES
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import leases


_logger = get_logger("optuna.ttp.store")


@dataclass(frozen=True)
class Holding:
    """The process and machine that hold a lease, and the seconds since they acquired it."""

    holder: str
    seconds: float


class Lease:
    """The right to compute the spectrum of a key, until it is released or its owner dies.

    :func:`acquire` makes it. As a context manager it is prolonged by a thread, and released on
    exit. It expires ``seconds`` after it was last prolonged.
    """

    def __init__(self, database: Database, key: str, owner: str, seconds: float) -> None:
        self._database = database
        self._key = key
        self._owner = owner
        self._seconds = seconds
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="ttp-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._released.set()
        try:
            # If this fails, waiting workers only wait longer, until the lease expires.
            self._database.write(self._delete, patience=1.0)
        except StoreError as failure:
            _logger.warning(
                f"A lease could not be released and runs out in {self._seconds:.0f} s: {failure}"
            )

    def _beat(self) -> None:
        """Prolong the lease until it is released or, with a warning, another worker has it."""
        while not self._released.wait(self._seconds / RULES.beats_per_lease):
            try:
                alive = self._database.write(self._prolong)
            except StoreError as failure:
                _logger.debug(f"A sign of life did not arrive: {failure}")
                continue
            if not alive and not self._released.is_set():
                _logger.warning(
                    "Another worker has taken over what this one computes, because this one gave "
                    f"no sign of life for {self._seconds:.0f} s. The first result is stored."
                )
                return

    def _prolong(self, connection: sa.Connection) -> bool:
        """Let the lease expire ``seconds`` from now; return whether this owner still has it."""
        statement = (
            sa.update(leases)
            .where(leases.c.key == self._key, leases.c.owner == self._owner)
            .values(expires_at=DatabaseTime() + self._seconds)
        )
        return connection.execute(statement).rowcount == 1

    def _delete(self, connection: sa.Connection) -> None:
        connection.execute(
            sa.delete(leases).where(leases.c.key == self._key, leases.c.owner == self._owner)
        )


def acquire(database: Database, key: str, seconds: float) -> Lease | None:
    """Return a lease of a key for ``seconds``, or None if another worker has one."""
    owner = uuid4().hex
    mine = {
        "owner": owner,
        "holder": f"process {os.getpid()} on {platform.node()}"[:255],
        "acquired_at": DatabaseTime(),
        "expires_at": DatabaseTime() + seconds,
    }

    def take(connection: sa.Connection) -> bool:
        query = sa.select(leases.c.owner).where(leases.c.key == key)
        current = connection.execute(query).scalar()
        if current is None:
            connection.execute(sa.insert(leases).values(key=key, **mine))
            return True
        dead = sa.update(leases).where(leases.c.key == key, leases.c.expires_at <= DatabaseTime())
        # The owners are equal if this function ran before, and the commit's answer was lost.
        return connection.execute(dead.values(mine)).rowcount == 1 or current == owner

    try:
        taken = database.write(take)
    except sa.exc.IntegrityError:
        # Another worker inserted its row between this one's query and insertion.
        return None
    return Lease(database, key, owner, seconds) if taken else None


def holding(database: Database, key: str) -> Holding | None:
    """Return the holder of the lease of a key, or None if there is none or it has expired."""
    query = sa.select(leases.c.holder, DatabaseTime() - leases.c.acquired_at).where(
        leases.c.key == key, leases.c.expires_at > DatabaseTime()
    )
    row = database.read(lambda connection: connection.execute(query).first())
    return None if row is None else Holding(row[0], max(0.0, float(row[1])))
