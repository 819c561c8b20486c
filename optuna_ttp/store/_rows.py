"""A spectrum as rows: how it gets into the database, out of it, and out of the way."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from dataclasses import fields
from datetime import datetime
from datetime import timezone
import json
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp._util.exceptions import FingerprintMismatchError
from optuna_ttp._util.exceptions import StoreError
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import _checkpoint
from optuna_ttp.store import _chunks
from optuna_ttp.store._identity import complete
from optuna_ttp.store._object_folder import ObjectFolder
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import leases
from optuna_ttp.store._schema import quarantine
from optuna_ttp.store._schema import spectra
from optuna_ttp.store._stored_spectrum import StoredSpectrum


class DamagedRow(Exception):
    """A row cannot be served. It says why, and which one it is."""

    def __init__(self, row: sa.Row[Any], reason: str) -> None:
        super().__init__(reason)
        self.row = row
        self.reason = reason


def is_leased(key: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Return the condition that somebody is working on a key.

    Args:
        key:
            The key, as a column.
    """
    alive = sa.select(leases.c.key).where(
        leases.c.key == key, leases.c.expires_at > DatabaseTime()
    )
    return sa.exists(alive)


def insert(
    connection: sa.Connection,
    key: str,
    spectrum: Spectrum,
    settings: dict[str, Any],
    folder: ObjectFolder | None,
    threshold: int,
) -> None:
    """Write a spectrum.

    Args:
        connection:
            In a transaction, which makes it one piece.
        key:
            Of the row.
        spectrum:
            What to store.
        settings:
            What it was computed with.
        folder:
            For large arrays, or :obj:`None`.
        threshold:
            Arrays of so many bytes go to the folder.
    """
    digest = blob.Digest()
    pieces = spectrum.to_pieces(digest)
    name = uuid4().hex
    in_folder = folder is not None and _n_bytes(spectrum) >= threshold
    if folder is not None and in_folder:
        n_bytes = folder.write(pieces, digest)
    else:
        n_bytes = _chunks.insert(connection, name, pieces)
    metadata = spectrum.metadata
    row = {
        "key": key,
        "fingerprint": metadata.fingerprint,
        "name": metadata.name[:255],
        "settings": json.dumps(complete(settings), sort_keys=True),
        "n_samples": spectrum.n_samples,
        "n_outputs": spectrum.n_outputs,
        "rank": spectrum.rank,
        "compute_seconds": metadata.compute_seconds,
        "created_at": metadata.created_at,
        "checksum": digest.hexdigest(),
        "provenance": json.dumps(asdict(metadata), sort_keys=True),
        "blob": name,
        "in_folder": in_folder,
        "n_bytes": n_bytes,
    }
    connection.execute(sa.insert(spectra).values(used_at=DatabaseTime(), **row))
    _checkpoint.clear(connection, key)


def select(connection: sa.Connection, row: sa.Row[Any], folder: ObjectFolder | None) -> Spectrum:
    """Read the arrays of a row.

    Args:
        connection:
            In the transaction that read the row.
        row:
            Of the table of spectra.
        folder:
            For large arrays, or :obj:`None`.

    Returns:
        The spectrum.

    Raises:
        DamagedRow:
            If a bit is not as it was written.
        FingerprintMismatchError:
            If the arrays belong to another task.
        StoreError:
            If they lie in a folder that this store does not know or cannot read.
    """
    try:
        if row.in_folder:
            if folder is None:
                raise StoreError(
                    f"The arrays of the spectrum {row.fingerprint[:12]}... lie in an object "
                    "folder. Open the store with object_folder=..."
                )
            with closing(folder.open(row.checksum)) as file:
                spectrum = _checked(file, row)
        else:
            pieces = blob.Pieces(_chunks.select(connection, row.blob, row.n_bytes))
            spectrum = _checked(pieces, row)
        _check_description(row, spectrum)
    except DamagedSpectrumError as error:
        raise DamagedRow(row, str(error)) from error
    if spectrum.metadata.fingerprint != row.fingerprint:
        raise FingerprintMismatchError(
            f"The stored spectrum must belong to the task {row.fingerprint[:12]}... but got one "
            f"of {spectrum.metadata.fingerprint[:12]}..."
        )
    return spectrum


def delete(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    """Delete rows and their arrays. Files in the folder stay until :meth:`SpectrumStore.prune`.

    Args:
        connection:
            In a transaction.
        condition:
            Which.

    Returns:
        How many there were.
    """
    names = connection.execute(sa.select(spectra.c.blob).where(condition)).scalars().all()
    _chunks.delete(connection, names)
    return connection.execute(sa.delete(spectra).where(spectra.c.blob.in_(names))).rowcount


def put_aside(connection: sa.Connection, row: sa.Row[Any], reason: str) -> bool:
    """Move a row where it is never served from. Its arrays stay, for who wants to look.

    Args:
        connection:
            In a transaction.
        row:
            Of the table of spectra.
        reason:
            What is wrong.

    Returns:
        Whether it was still there.
    """
    # By its arrays, not by its key: another worker may have replaced it meanwhile.
    here = sa.and_(spectra.c.key == row.key, spectra.c.blob == row.blob)
    if connection.execute(sa.delete(spectra).where(here)).rowcount != 1:
        return False
    kept = ("blob", "fingerprint", "name", "settings", "n_bytes")
    values = {name: getattr(row, name) for name in kept}
    connection.execute(
        sa.insert(quarantine).values(reason=reason, quarantined_at=DatabaseTime(), **values)
    )
    return True


def listed(row: sa.Row[Any]) -> StoredSpectrum:
    """Return what a row says of a spectrum.

    Args:
        row:
            Of the table of spectra.

    Raises:
        DamagedSpectrumError:
            If that is not as it was written.
    """
    values = {field.name: getattr(row, field.name) for field in fields(StoredSpectrum)}
    try:
        for name in ("settings", "provenance"):
            # What is no object has no items.
            values[name] = dict(json.loads(values[name]).items())
        values["used_at"] = _iso(row.used_at) if row.used_at else None
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        reason = f"its description is damaged ({type(error).__name__})"
        raise DamagedSpectrumError(reason) from error
    values["in_folder"] = bool(row.in_folder)
    return StoredSpectrum(**values)


def _check_description(row: sa.Row[Any], spectrum: Spectrum) -> None:
    described = listed(row)
    for name in ("n_samples", "n_outputs", "rank"):
        if getattr(described, name) != getattr(spectrum, name):
            raise DamagedSpectrumError(f"its {name} is not that of its arrays")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _checked(stream: blob.Readable, row: sa.Row[Any]) -> Spectrum:
    digest = blob.Digest()
    spectrum = Spectrum.from_stream(stream, row.n_bytes, digest)
    if digest.hexdigest() != row.checksum:
        raise DamagedSpectrumError("its checksum does not match")
    return spectrum


def _n_bytes(spectrum: Spectrum) -> int:
    # What is large.
    validation = spectrum.validation
    features = 0 if validation is None else validation.features.nbytes
    return spectrum.eigenvectors.nbytes + features
