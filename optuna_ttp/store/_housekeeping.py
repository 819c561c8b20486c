"""Checking, cleaning and shrinking of a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from optuna_ttp._util.exceptions import FingerprintMismatchError
from optuna_ttp.store import _checkpoint
from optuna_ttp.store import _rows
from optuna_ttp.store._database import Database
from optuna_ttp.store._object_folder import ObjectFolder
from optuna_ttp.store._rules import RULES
from optuna_ttp.store._schema import checkpoints
from optuna_ttp.store._schema import chunks
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import leases
from optuna_ttp.store._schema import quarantine
from optuna_ttp.store._schema import spectra


@dataclass(frozen=True)
class Verification:
    """The result of :meth:`SpectrumStore.verify`: numbers of spectra, and faults by key.

    ``n_checked`` spectra were read as a whole, ``damaged`` gives the reason for each damaged one
    by its key, ``n_quarantined`` were put aside as damaged, earlier or just now, and
    ``n_orphaned`` blobs in the database belong to no spectrum and no checkpoint.
    """

    n_checked: int
    damaged: dict[str, str]
    n_quarantined: int
    n_orphaned: int

    @property
    def is_clean(self) -> bool:
        """True if no spectrum is damaged or was put aside, and no blob is orphaned."""
        return not (self.damaged or self.n_quarantined or self.n_orphaned)


@dataclass(frozen=True)
class Pruning:
    """The result of :meth:`SpectrumStore.prune`: how much was deleted.

    It deleted ``n_evicted`` spectra because of the limit, ``n_quarantined`` damaged ones that had
    been put aside, the blocks of ``n_checkpoints`` computations that no worker continued for a
    week, and ``n_orphaned`` blobs in the database and ``n_object_bytes`` bytes of files that no
    row referred to. ``n_bytes_left`` bytes of spectra are stored now.
    """

    n_evicted: int
    n_quarantined: int
    n_checkpoints: int
    n_orphaned: int
    n_object_bytes: int
    n_bytes_left: int


def verify(database: Database, folder: ObjectFolder | None, put_aside: bool) -> Verification:
    """Read every spectrum and compare checksums; see :meth:`SpectrumStore.verify`."""
    keys = database.read(lambda c: c.execute(sa.select(spectra.c.key)).scalars().all())
    faults = {key: _fault(database, key, folder, put_aside) for key in keys}
    damaged = {key: fault for key, fault in faults.items() if fault}

    def count(connection: sa.Connection) -> tuple[int, int]:
        aside = connection.execute(sa.select(sa.func.count()).select_from(quarantine)).scalar_one()
        return aside, len(_orphaned(connection))

    n_quarantined, n_orphaned = database.read(count)
    return Verification(len(keys), damaged, n_quarantined, n_orphaned)


def prune(database: Database, folder: ObjectFolder | None, max_bytes: int | None) -> Pruning:
    """Delete unused rows, chunks and files; see :meth:`SpectrumStore.prune`."""
    n_quarantined, n_checkpoints, n_orphaned = database.write(_sweep)
    n_evicted = 0 if max_bytes is None else evict(database, max_bytes)
    n_object_bytes = 0
    if folder is not None:
        n_object_bytes = folder.delete_unused(database.read(_named_files))
    left = sa.select(sa.func.coalesce(sa.func.sum(spectra.c.n_bytes), 0))
    n_left = int(database.read(lambda c: c.execute(left).scalar_one()))
    return Pruning(n_evicted, n_quarantined, n_checkpoints, n_orphaned, n_object_bytes, n_left)


def evict(database: Database, max_bytes: int, keep: Iterable[str] = ()) -> int:
    """Delete the least recently used spectra beyond ``max_bytes``; return the number deleted.

    Spectra of the keys in ``keep``, and those that a worker is computing, are not deleted.
    """

    def work(connection: sa.Connection) -> int:
        query = sa.select(spectra.c.key, spectra.c.n_bytes).order_by(
            spectra.c.used_at, spectra.c.created_at, spectra.c.key
        )
        rows = connection.execute(query).all()
        excess = sum(row.n_bytes for row in rows) - max_bytes
        n_evicted = 0
        for row in rows:
            if excess <= 0:
                break
            if row.key in protected:
                continue
            # The statement itself checks the lease, which may have been taken a moment ago.
            free = sa.and_(spectra.c.key == row.key, ~_rows.is_leased(spectra.c.key))
            if _rows.delete(connection, free):
                excess -= row.n_bytes
                n_evicted += 1
        return n_evicted

    protected = set(keep)
    return database.write(work)


def _fault(database: Database, key: str, folder: ObjectFolder | None, put_aside: bool) -> str:
    """Return the fault of a key's spectrum, or an empty text; put it aside if ``put_aside``."""

    def work(connection: sa.Connection) -> None:
        row = connection.execute(sa.select(spectra).where(spectra.c.key == key)).first()
        # Without a row, another worker has deleted it meanwhile.
        if row is not None:
            _rows.select(connection, row, folder)

    try:
        database.read(work)
    except FingerprintMismatchError as error:
        return str(error)
    except _rows.DamagedRow as error:
        row, reason = error.row, error.reason
        if put_aside:
            database.write(lambda connection: _rows.put_aside(connection, row, reason))
        return reason
    return ""


def _sweep(connection: sa.Connection) -> tuple[int, int, int]:
    """Delete expired leases, the quarantine, stale checkpoints and orphaned blobs.

    Returns the numbers of quarantined spectra, of checkpoints and of other orphaned blobs.
    """
    now = DatabaseTime()
    connection.execute(sa.delete(leases).where(leases.c.expires_at <= now))
    aside = connection.execute(sa.delete(quarantine)).rowcount
    stale = (
        sa.select(checkpoints.c.key)
        .where(~_rows.is_leased(checkpoints.c.key))
        .group_by(checkpoints.c.key)
        .having(sa.func.max(checkpoints.c.saved_at) <= now - RULES.checkpoint_seconds)
    )
    keys = connection.execute(stale).scalars().all()
    for key in keys:
        _checkpoint.clear(connection, key)
    # The blobs of the deleted quarantine are among the orphaned ones now.
    orphaned = _orphaned(connection)
    for name in orphaned:
        connection.execute(sa.delete(chunks).where(chunks.c.blob == name))
    return aside, len(keys), max(0, len(orphaned) - aside)


def _orphaned(connection: sa.Connection) -> list[str]:
    """Return the names of blobs that neither a spectrum, a checkpoint nor the quarantine owns."""
    owners = (spectra, checkpoints, quarantine)
    query = sa.select(chunks.c.blob).where(
        chunks.c.position == 0,
        *[chunks.c.blob.not_in(sa.select(table.c.blob)) for table in owners],
    )
    return list(connection.execute(query).scalars().all())


def _named_files(connection: sa.Connection) -> set[str]:
    """Return the names of the files in the object folder that rows refer to."""
    query: Any = sa.select(spectra.c.checksum).where(spectra.c.in_folder)
    return set(connection.execute(query).scalars().all())
