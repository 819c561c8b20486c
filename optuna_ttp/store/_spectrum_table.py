"""Spectra in the database by fingerprint and settings, without any computation."""

from __future__ import annotations

from typing import Any

from optuna.logging import get_logger
import sqlalchemy as sa

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp._util.exceptions import DamagedSpectrumWarning
from optuna_ttp._util.exceptions import StoreError
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import _housekeeping
from optuna_ttp.store import _rows
from optuna_ttp.store._database import Database
from optuna_ttp.store._identity import key as key_of
from optuna_ttp.store._object_folder import ObjectFolder
from optuna_ttp.store._rules import RULES
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import spectra
from optuna_ttp.store._stored_spectrum import StoredSpectrum


_logger = get_logger("optuna.ttp.store")


class SpectrumTable:
    """Reads and writes spectra, each as a whole and with its checksums compared.

    Arrays of ``threshold`` bytes or more go to the folder, if there is one. Writing deletes the
    least recently used spectra beyond ``max_bytes``, if that is given.
    """

    def __init__(
        self,
        database: Database,
        folder: ObjectFolder | None,
        threshold: int,
        max_bytes: int | None,
    ) -> None:
        self.database = database
        self.folder = folder
        self._threshold = threshold
        self._max_bytes = max_bytes

    def get(self, fingerprint: str, settings: dict[str, Any]) -> Spectrum | None:
        """Return the spectrum of a task's fingerprint and settings, see :meth:`get_by_key`."""
        return self.get_by_key(key_of(fingerprint, settings))

    def get_by_key(self, key: str) -> Spectrum | None:
        """Return a key's spectrum, or None; put a damaged one aside with a warning."""

        def work(connection: sa.Connection) -> tuple[Spectrum | None, bool]:
            age = (DatabaseTime() - spectra.c.used_at).label("age")
            query = sa.select(spectra, age).where(spectra.c.key == key)
            row = connection.execute(query).first()
            if row is None:
                return None, False
            return _rows.select(connection, row, self.folder), row.age > RULES.touch_seconds

        try:
            spectrum, is_stale = self.database.read(work)
        except _rows.DamagedRow as error:
            row, reason = error.row, error.reason
            self.database.write(lambda connection: _rows.put_aside(connection, row, reason))
            warn_caller(
                f"The stored spectrum {row.fingerprint[:12]}... of {row.name!r} is damaged and "
                f"was put aside: {reason}.",
                DamagedSpectrumWarning,
            )
            return None
        if is_stale:
            self._touch(key)
        return spectrum

    def _touch(self, key: str) -> None:
        """Set a spectrum's time of last use to now; a failure is only logged."""
        statement = sa.update(spectra).where(spectra.c.key == key).values(used_at=DatabaseTime())
        try:
            self.database.write(lambda connection: connection.execute(statement))
        except StoreError as error:
            # A user who may only read the database can still use the spectrum.
            _logger.debug(f"The time of use of a spectrum could not be written: {error}")

    def put(
        self, spectrum: Spectrum, settings: dict[str, Any], *, overwrite: bool = False
    ) -> bool:
        """Store a spectrum and return True.

        If a spectrum with the same key is stored, it stays and False is returned; with
        ``overwrite`` the new one replaces it.
        """
        key = key_of(spectrum.metadata.fingerprint, settings)
        here = spectra.c.key == key

        def work(connection: sa.Connection) -> bool:
            if overwrite:
                _rows.delete(connection, here)
            elif connection.execute(sa.select(spectra.c.key).where(here)).first() is not None:
                return False
            _rows.insert(connection, key, spectrum, settings, self.folder, self._threshold)
            return True

        try:
            stored = self.database.write(work)
        except sa.exc.IntegrityError:
            _logger.debug("Another process stored the same spectrum first.")
            stored = False
        if self._max_bytes is not None:
            _housekeeping.evict(self.database, self._max_bytes, keep=[key])
        return stored

    def list(self) -> list[StoredSpectrum]:
        """Return the descriptions of all spectra, oldest first; unreadable ones give a warning."""
        query = sa.select(spectra).order_by(spectra.c.created_at, spectra.c.key)
        rows = self.database.read(lambda connection: connection.execute(query).all())
        descriptions = [_description(row) for row in rows]
        return [description for description in descriptions if description is not None]

    def delete(self, fingerprint: str) -> int:
        """Delete all spectra of a task's fingerprint and return their number."""
        condition = spectra.c.fingerprint == fingerprint
        return self.database.write(lambda connection: _rows.delete(connection, condition))


def _description(row: sa.Row[Any]) -> StoredSpectrum | None:
    """Return the description in a row, or None, with a warning, if it cannot be read."""
    try:
        return _rows.listed(row)
    except DamagedSpectrumError as error:
        warn_caller(
            f"The stored spectrum {row.key[:12]}... is left out of the list: {error}. "
            "'optuna-ttp store verify --put-aside' lets it be computed again.",
            DamagedSpectrumWarning,
        )
        return None
