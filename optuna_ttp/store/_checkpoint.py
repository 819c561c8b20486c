"""Finished parts of a long computation, for the worker that continues it after a crash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
import sqlalchemy as sa

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp._util.exceptions import DamagedSpectrumWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.spectrum import blob
from optuna_ttp.store import _chunks
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import checkpoints
from optuna_ttp.store._schema import DatabaseTime


class Checkpoint:
    """The named arrays ("blocks") that the computation of one spectrum has finished so far.

    :meth:`SpectrumStore.checkpoint` makes it. The blocks are deleted when the spectrum is stored.

    Example:
        >>> checkpoint = store.checkpoint(task)
        >>> checkpoint.save_block("gram/0", np.eye(3))
        >>> checkpoint.load_block("gram/0").shape
        (3, 3)
    """

    def __init__(self, database: Database, key: str) -> None:
        self._database = database
        self._key = key

    def save_block(self, name: str, array: NDArray[Any]) -> None:
        """Store an array of numbers under a name of 1 to 255 characters, replacing an older one.

        Raises ValueError if the name is empty or too long, StoreError if the database fails.
        """
        self.save_blocks({name: array})

    def save_blocks(self, blocks: Mapping[str, NDArray[Any]]) -> None:
        """Store several arrays by their names, as :meth:`save_block` does, all or none of them."""
        for name in blocks:
            if not 0 < len(name) <= 255:
                raise ValueError(f"name must have 1 to 255 characters but got {len(name)}.")

        def work(connection: sa.Connection) -> None:
            for name, array in blocks.items():
                _delete(connection, *self._is(name))
                blob_name = uuid4().hex
                pieces = blob.write({"name": name}, {"block": np.asarray(array)})
                n_bytes = _chunks.insert(connection, blob_name, pieces)
                row = {"key": self._key, "name": name, "blob": blob_name, "n_bytes": n_bytes}
                connection.execute(sa.insert(checkpoints).values(saved_at=DatabaseTime(), **row))

        try:
            self._database.write(work)
        except sa.exc.IntegrityError:
            # A worker that was believed dead saved the same blocks.
            return

    def load_block(self, name: str) -> NDArray[Any] | None:
        """Return the array of a name, or None if it is missing or, with a warning, damaged.

        The warning is a DamagedSpectrumWarning. Raises StoreError if the database fails.
        """

        def work(connection: sa.Connection) -> NDArray[Any] | None:
            row = connection.execute(sa.select(checkpoints).where(*self._is(name))).first()
            if row is None:
                return None
            pieces = blob.Pieces(_chunks.select(connection, row.blob, row.n_bytes))
            content = blob.read(pieces, row.n_bytes)
            if content.meta != {"name": name} or set(content.arrays) != {"block"}:
                raise DamagedSpectrumError("it is another block")
            return content.arrays["block"]

        try:
            return self._database.read(work)
        except DamagedSpectrumError as error:
            warn_caller(
                f"The stored block {name!r} is damaged and computed again: {error}.",
                DamagedSpectrumWarning,
            )
            return None

    def clear(self) -> None:
        """Delete all blocks of this spectrum. Raises StoreError if the database fails."""
        self._database.write(lambda connection: clear(connection, self._key))

    def _is(self, name: str) -> tuple[sa.ColumnElement[bool], ...]:
        """Return the SQL conditions that select the row of the block of a name."""
        return checkpoints.c.key == self._key, checkpoints.c.name == name


def clear(connection: sa.Connection, key: str) -> None:
    """Delete the blocks of a spectrum's key, in the connection's transaction."""
    _delete(connection, checkpoints.c.key == key)


def _delete(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> None:
    """Delete the blocks whose rows fulfil all SQL conditions, and the chunks of their arrays."""
    names = connection.execute(sa.select(checkpoints.c.blob).where(*conditions)).scalars().all()
    _chunks.delete(connection, names)
    # The blob's name selects a row, so that one that another worker has written since then stays.
    connection.execute(sa.delete(checkpoints).where(checkpoints.c.blob.in_(names)))
