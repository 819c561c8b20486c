"""A spectrum as rows of the database: writing, reading, deleting, putting aside."""

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
    """The spectrum of a row of the table of spectra is damaged; ``reason`` says how."""

    def __init__(self, row: sa.Row[Any], reason: str) -> None:
        super().__init__(reason)
        self.row = row
        self.reason = reason


def is_leased(key: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Return an SQL condition: a worker has a lease of the key in a column that still counts."""
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
    """Write a spectrum under a key and delete the checkpoint of its computation.

    Arrays of ``threshold`` bytes or more go to the folder, if there is one. All rows are changed
    in the connection's transaction.
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
    """Read the spectrum of a row, in the transaction that read the row.

    Raises DamagedRow if a bit has changed since it was written, FingerprintMismatchError if the
    arrays belong to another task, StoreError if they lie in a folder that this store does not
    know or cannot read.
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
            f"of {spectrum.metadata.fingerprint[:12]}... Delete it with SpectrumStore.delete, so "
            "that it is computed again."
        )
    return spectrum


def delete(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    """Delete the spectra that fit a condition and return their number.

    Files in the object folder stay until :meth:`SpectrumStore.prune`.
    """
    names = connection.execute(sa.select(spectra.c.blob).where(condition)).scalars().all()
    _chunks.delete(connection, names)
    return connection.execute(sa.delete(spectra).where(spectra.c.blob.in_(names))).rowcount


def put_aside(connection: sa.Connection, row: sa.Row[Any], reason: str) -> bool:
    """Move a row to the quarantine, with the reason, and return whether it was still there.

    Spectra there are not returned any more, but their arrays can be examined.
    """
    # The blob is compared, too, because another worker may have replaced the row meanwhile.
    here = sa.and_(spectra.c.key == row.key, spectra.c.blob == row.blob)
    if connection.execute(sa.delete(spectra).where(here)).rowcount != 1:
        return False
    columns = ("blob", "fingerprint", "name", "settings", "n_bytes")
    values = {name: getattr(row, name) for name in columns}
    connection.execute(
        sa.insert(quarantine).values(reason=reason, quarantined_at=DatabaseTime(), **values)
    )
    return True


def listed(row: sa.Row[Any]) -> StoredSpectrum:
    """Return the description of a row's spectrum; raise DamagedSpectrumError if malformed."""
    values = {field.name: getattr(row, field.name) for field in fields(StoredSpectrum)}
    try:
        for name in ("settings", "provenance"):
            # A value that is no JSON object has no items.
            values[name] = dict(json.loads(values[name]).items())
        values["used_at"] = _iso(row.used_at)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        reason = f"its description is damaged ({type(error).__name__})"
        raise DamagedSpectrumError(reason) from error
    values["in_folder"] = bool(row.in_folder)
    return StoredSpectrum(**values)


def _check_description(row: sa.Row[Any], spectrum: Spectrum) -> None:
    """Raise DamagedSpectrumError if N, C or r in a row are not those of the spectrum's arrays."""
    described = listed(row)
    for name in ("n_samples", "n_outputs", "rank"):
        if getattr(described, name) != getattr(spectrum, name):
            raise DamagedSpectrumError(f"its {name} is not that of its arrays")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _checked(stream: blob.Readable, row: sa.Row[Any]) -> Spectrum:
    """Read a row's spectrum; raise DamagedSpectrumError if its checksum is not the row's."""
    digest = blob.Digest()
    spectrum = Spectrum.from_stream(stream, row.n_bytes, digest)
    if digest.hexdigest() != row.checksum:
        raise DamagedSpectrumError("its checksum does not match")
    return spectrum


def _n_bytes(spectrum: Spectrum) -> int:
    """Return the bytes of the eigenvectors and validation features, which can be large."""
    validation = spectrum.validation
    features = 0 if validation is None else validation.features.nbytes
    return spectrum.eigenvectors.nbytes + features
