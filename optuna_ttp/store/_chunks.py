"""Blobs in short rows, so that neither a driver nor a server has to hold a whole one at once."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator

import sqlalchemy as sa

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp.spectrum import blob
from optuna_ttp.store._schema import chunks


def insert(connection: sa.Connection, name: str, pieces: Iterable[bytes]) -> int:
    """Write each piece of a blob as a row under the blob's name; return the total of bytes."""
    n_bytes = 0
    for position, piece in enumerate(pieces):
        connection.execute(sa.insert(chunks), {"blob": name, "position": position, "data": piece})
        n_bytes += len(piece)
    return n_bytes


def select(connection: sa.Connection, name: str, n_bytes: int) -> Iterator[bytes]:
    """Yield the pieces of a blob of ``n_bytes`` bytes, each read from its row when it is needed.

    Raises DamagedSpectrumError if rows are missing, or longer than the longest piece of a blob.
    """
    query = (
        sa.select(chunks.c.position, sa.func.length(chunks.c.data))
        .where(chunks.c.blob == name)
        .order_by(chunks.c.position)
    )
    lengths = {row[0]: row[1] for row in connection.execute(query)}
    # This is checked before any row is read, so that a forged row cannot fill the memory.
    if (
        list(lengths) != list(range(len(lengths)))
        or sum(lengths.values()) != n_bytes
        or max(lengths.values(), default=0) > blob.FRAME
    ):
        raise DamagedSpectrumError(
            f"{n_bytes} bytes must be there but got {sum(lengths.values())} in {len(lengths)} rows"
        )
    for position in lengths:
        query = sa.select(chunks.c.data).where(
            chunks.c.blob == name, chunks.c.position == position
        )
        data = connection.execute(query).scalar_one()
        if not isinstance(data, bytes):
            # SQLite accepts values of any type in any column.
            raise DamagedSpectrumError("a row holds no bytes")
        yield data


def delete(connection: sa.Connection, names: Iterable[str]) -> None:
    """Delete the rows of blobs, in the connection's transaction."""
    for name in names:
        connection.execute(sa.delete(chunks).where(chunks.c.blob == name))
