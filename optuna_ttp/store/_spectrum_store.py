"""The store's face."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
import inspect
import math
from numbers import Real
import os
from pathlib import Path
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna.logging import get_logger
import sqlalchemy as sa
from sqlalchemy.engine import URL

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp._util.exceptions import DamagedSpectrumWarning
from optuna_ttp._util.exceptions import StoreError
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import write_whole
from optuna_ttp.store import _housekeeping
from optuna_ttp.store import _learned
from optuna_ttp.store import _lease
from optuna_ttp.store import _rows
from optuna_ttp.store._checkpoint import Checkpoint
from optuna_ttp.store._database import Database
from optuna_ttp.store._housekeeping import Pruning
from optuna_ttp.store._housekeeping import Verification
from optuna_ttp.store._identity import check_settings
from optuna_ttp.store._identity import complete
from optuna_ttp.store._identity import key as key_of
from optuna_ttp.store._identity import SETTING_DEFAULTS
from optuna_ttp.store._kernel_blocks import KernelBlocks
from optuna_ttp.store._learned import Learned
from optuna_ttp.store._object_folder import ObjectFolder
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import spectra
from optuna_ttp.store._stored_spectrum import StoredSpectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


_logger = get_logger("optuna.ttp.store")

# Readers do not write more often than this to say that a spectrum is in use.
_TOUCH_SECONDS = 60.0
_MESSAGE_SECONDS = 30.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 2.0


class SpectrumStore:
    """Keeps spectra in any database that Optuna supports: SQLite, PostgreSQL, MySQL.

    A spectrum is found by the fingerprint of its task and the settings that shape it. Of all
    workers that ask for the same one, the first computes it and the others wait for it. A store
    may share the database of an Optuna study, which is what teams should do: its tables begin
    with ``ttp_``, and Optuna's own are not touched.

    Every read is checked: a spectrum of which a bit has changed is put aside with a
    :class:`~optuna_ttp.DamagedSpectrumWarning` and computed again.

    Example:
        >>> store = SpectrumStore("sqlite:///ttp.db")
        >>> spectrum = store.get_or_compute(task, explained_trace=0.999)
        >>> store.list()[0].rank == spectrum.rank
        True

    Args:
        url:
            A database URL. A SQLite file in the user's cache folder by default.
        object_folder:
            Large arrays go to files in this folder, which all workers must see, instead of the
            database. None by default.
        object_threshold:
            Bytes from which arrays are large. 64 MiB by default.
        max_bytes:
            When more than this is stored, the spectra that were not used for longest are deleted,
            but none that somebody works on. No limit by default.
        lease_seconds:
            A worker that computes something and was not heard of for so long, by the database's
            clock, is believed dead. A minute by default.

    Raises:
        ValueError:
            If a number is out of its range.
        StoreError:
            If the database cannot be opened. No password appears in the message.
        StoreVersionError:
            If the store was made by a newer version of this package.
    """

    def __init__(
        self,
        url: str | URL | None = None,
        *,
        object_folder: str | os.PathLike[str] | None = None,
        object_threshold: int = 64 * 2**20,
        max_bytes: int | None = None,
        lease_seconds: float = 60.0,
    ) -> None:
        if isinstance(lease_seconds, bool) or not isinstance(lease_seconds, int | float):
            raise TypeError(f"lease_seconds must be a number but got {lease_seconds!r}.")
        if not 0.1 <= lease_seconds < math.inf:
            raise ValueError(f"lease_seconds must be at least 0.1 but got {lease_seconds}.")
        _check_limit(max_bytes)
        if object_threshold < 0:
            raise ValueError(f"object_threshold must be nonnegative but got {object_threshold}.")
        self._database = Database(url)
        self._folder = None if object_folder is None else ObjectFolder(object_folder)
        self._threshold = object_threshold
        self._max_bytes = max_bytes
        self._lease_seconds = lease_seconds

    def __repr__(self) -> str:
        return f"SpectrumStore({self._database.shown!r})"

    def get_or_compute(
        self,
        task: FineTuningTask,
        *,
        instead_of_waiting: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Spectrum:
        """Return the task's spectrum, computing and storing it where it is not there yet.

        Where another worker is computing it, this one waits and says so once in a while. A worker
        that dies is succeeded by one that waits. With ``distributed=True`` the first process of
        the group looks and stores for all of them, and none waits.

        Args:
            task:
                What is fine-tuned.
            instead_of_waiting:
                Settings of something cheaper to go on with where another worker is computing what
                was asked for: those given here replace the others. Waits by default.
            settings:
                Keyword arguments of :func:`~optuna_ttp.compute_spectrum`. Engine, precision and
                truncation belong to what is looked for, and of a sketch its seed and the width
                that memory allows; the others only matter when computing. The time of a step is
                measured, and the linearisation probed, where the stored spectrum lacks it.

        Returns:
            The spectrum.

        Raises:
            TypeError:
                If this is no task, or a setting is unknown.
            StoreError:
                If the database fails.
        """
        from optuna_ttp.ntk import in_all
        from optuna_ttp.ntk import resolve_engine
        from optuna_ttp.ntk import widest_sketch

        budget = {k: settings[k] for k in ("max_memory",) if k in settings}

        def resolved() -> str:
            _check_asked(task, {**settings, **(instead_of_waiting or {})})
            return resolve_engine(task, settings.get("engine", "auto"), **budget)[0]

        engine = in_all(resolved, distributed=settings.get("distributed", False))
        settings = {**settings, "engine": engine}
        identity = {k: settings[k] for k in SETTING_DEFAULTS if k in settings}
        identity["max_sketch_width"] = widest_sketch(
            task, settings.get("dtype", "float32"), **budget
        )
        if settings.get("distributed", False):
            return self._by_all(task, identity, settings)
        key = key_of(task.fingerprint, identity)
        started = time.perf_counter()
        waiting = _Waiting(task.name)
        while True:
            stored = self.get(task, **identity)
            lease = None
            if stored is None:
                lease = _lease.acquire(self._database, key, self._lease_seconds)
            if lease is not None:
                with lease:
                    # It may have been stored between the look and the lease.
                    stored = self.get(task, **identity)
                    if stored is None:
                        return self._computed(task, identity, settings)
            if stored is not None:
                _logger.info(
                    f"Read the spectrum of {task.name!r} in {time.perf_counter() - started:.2f} "
                    f"s; computing it took {stored.metadata.compute_seconds:.1f} s."
                )
                return self._completed(task, stored, identity, settings)
            if instead_of_waiting is not None:
                return self._cheaper(task, settings, instead_of_waiting)
            self._wait(key, waiting)

    def _by_all(
        self, task: FineTuningTask, identity: dict[str, Any], settings: dict[str, Any]
    ) -> Spectrum:
        """Compute with the other processes of a group; the first one looks, and stores.

        Without a lease: the others would wait for who has it, and that one for the others.
        """
        from optuna_ttp.ntk import by_first
        from optuna_ttp.ntk import check_same_task
        from optuna_ttp.ntk import compute_spectrum

        switches = {name: settings.get(name, True) for name in ("measure_speed", "probe")}
        check_same_task(task, {**identity, **switches})
        stored = by_first(lambda: self.get(task, **identity))
        if stored is not None:
            # By one of them, so that all have the same.
            return by_first(lambda: self._completed(task, stored, identity, settings))
        spectrum = compute_spectrum(task, **settings)
        by_first(lambda: self._put(spectrum, identity))
        return spectrum

    def _computed(
        self, task: FineTuningTask, identity: dict[str, Any], settings: dict[str, Any]
    ) -> Spectrum:
        from optuna_ttp.ntk import compute_spectrum

        resumable = settings["engine"] == "exact" and not settings.get("distributed", False)
        if resumable and settings.get("checkpoint") is None:
            # A killed worker's successor goes on where it stopped.
            blocks = KernelBlocks(self.checkpoint(task, **identity))
            settings = {**settings, "checkpoint": blocks}
        spectrum = compute_spectrum(task, **settings)
        if not self._put(spectrum, identity):
            # This worker was believed dead, and succeeded. All are to go on with the same numbers,
            # and nobody needs the blocks that it saved after the other one had finished.
            self.checkpoint(task, **identity).clear()
            return self.get(task, **identity) or spectrum
        _logger.info(
            f"Computed the spectrum of {task.name!r} in {spectrum.metadata.compute_seconds:.1f} s "
            "and stored it."
        )
        return spectrum

    def _cheaper(
        self, task: FineTuningTask, settings: dict[str, Any], changes: Mapping[str, Any]
    ) -> Spectrum:
        replaced = {**settings, **changes}
        identities = [
            complete({k: s[k] for k in SETTING_DEFAULTS if k in s}) for s in (settings, replaced)
        ]
        if identities[0] == identities[1]:
            raise ValueError(
                "instead_of_waiting must change engine, dtype, rank or explained_trace but got "
                f"{dict(changes)!r}."
            )
        _logger.info(
            f"Another worker is computing the spectrum of {task.name!r}; going on with "
            f"{dict(changes)}."
        )
        return self.get_or_compute(task, **replaced)

    def _wait(self, key: str, waiting: _Waiting) -> None:
        """Return once nobody computes the key any more."""
        pause = _SHORTEST_WAIT
        while True:
            holding = _lease.holding(self._database, key)
            if holding is None:
                return
            waiting.tell(holding)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_WAIT)

    def _completed(
        self,
        task: FineTuningTask,
        stored: Spectrum,
        identity: dict[str, Any],
        settings: dict[str, Any],
    ) -> Spectrum:
        """Add what an older or hastier computation left out."""
        from optuna_ttp.ntk import resolve_device
        from optuna_ttp.spectrum import measure_throughput

        if stored.probe is None and settings.get("probe", True):
            stored = self._probed(task, stored, identity, settings)
        if stored.throughput is None and settings.get("measure_speed", True):
            device = resolve_device(task, settings.get("device"))
            return replace(stored, throughput=measure_throughput(task, device=device))
        return stored

    def _probed(
        self,
        task: FineTuningTask,
        stored: Spectrum,
        identity: dict[str, Any],
        settings: dict[str, Any],
    ) -> Spectrum:
        from optuna_ttp.ntk import probe_linearisation
        from optuna_ttp.ntk import resolve_device

        key = key_of(task.fingerprint, identity)
        waiting = _Waiting(task.name)
        while True:
            lease = _lease.acquire(self._database, key, self._lease_seconds)
            if lease is None:
                self._wait(key, waiting)
                continue
            with lease:
                found = self.get(task, **identity)
                if found is not None and found.probe is not None:
                    return found
                device = resolve_device(task, settings.get("device"))
                stored = probe_linearisation(task, stored, device=device)
                self.put(stored, overwrite=True, **identity)
                return stored

    def get(self, task: FineTuningTask | str, **settings: Any) -> Spectrum | None:
        """Return a stored spectrum.

        Args:
            task:
                The task, or its fingerprint.
            settings:
                ``engine``, ``dtype``, ``rank`` and ``explained_trace`` as it was computed with.

        Returns:
            The spectrum, or :obj:`None` where there is none, or only a damaged one, which is put
            aside with a warning.

        Raises:
            FingerprintMismatchError:
                If the stored arrays belong to another task.
            StoreError:
                If the database fails.
        """
        fingerprint = task if isinstance(task, str) else task.fingerprint
        return self._get(spectra.c.key == key_of(fingerprint, settings))

    def _get(self, condition: sa.ColumnElement[bool]) -> Spectrum | None:
        def work(connection: sa.Connection) -> tuple[Spectrum | None, bool, str]:
            age = (DatabaseTime() - spectra.c.used_at).label("age")
            row = connection.execute(sa.select(spectra, age).where(condition)).first()
            if row is None:
                return None, False, ""
            return _rows.select(connection, row, self._folder), row.age > _TOUCH_SECONDS, row.key

        try:
            spectrum, is_stale, key = self._database.read(work)
        except _rows.DamagedRow as error:
            row, reason = error.row, error.reason
            self._database.write(lambda connection: _rows.put_aside(connection, row, reason))
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
        statement = sa.update(spectra).where(spectra.c.key == key).values(used_at=DatabaseTime())
        try:
            self._database.write(lambda connection: connection.execute(statement))
        except StoreError as error:
            # Who may only read can do without.
            _logger.debug(f"That a spectrum was used is not written down: {error}")

    def put(self, spectrum: Spectrum, *, overwrite: bool = False, **settings: Any) -> None:
        """Store a spectrum.

        Args:
            spectrum:
                What to store.
            overwrite:
                Replace one that is there for the same task and settings. It is kept by default.
            settings:
                ``engine``, ``dtype``, ``rank`` and ``explained_trace`` as it was computed with.

        Raises:
            ValueError:
                If the spectrum was not computed with these settings.
            StoreError:
                If the database fails.
        """
        if not isinstance(spectrum, Spectrum):
            raise TypeError(f"spectrum must be a Spectrum but got {type(spectrum).__name__}.")
        complete(settings)
        check_settings(spectrum, settings)
        self._put(spectrum, settings, overwrite=overwrite)

    def _put(
        self, spectrum: Spectrum, settings: dict[str, Any], *, overwrite: bool = False
    ) -> bool:
        """Store a spectrum and return whether it is the one that is stored now."""
        key = key_of(spectrum.metadata.fingerprint, settings)
        here = spectra.c.key == key

        def work(connection: sa.Connection) -> bool:
            if overwrite:
                _rows.delete(connection, here)
            elif connection.execute(sa.select(spectra.c.key).where(here)).first() is not None:
                return False
            _rows.insert(connection, key, spectrum, settings, self._folder, self._threshold)
            return True

        try:
            stored = self._database.write(work)
        except sa.exc.IntegrityError:
            _logger.debug("Another process stored the same spectrum first.")
            stored = False
        if self._max_bytes is not None:
            _housekeeping.evict(self._database, self._max_bytes, keep=[key])
        return stored

    def list(self) -> list[StoredSpectrum]:
        """Return what is stored, oldest first, without reading the arrays.

        One whose description cannot be read is left out with a
        :class:`~optuna_ttp.DamagedSpectrumWarning`.

        Raises:
            StoreError:
                If the database fails.
        """
        query = sa.select(spectra).order_by(spectra.c.created_at, spectra.c.key)
        rows = self._database.read(lambda connection: connection.execute(query).all())
        found = [_listed_or_told(row) for row in rows]
        return [stored for stored in found if stored is not None]

    def delete(self, task: FineTuningTask | str) -> int:
        """Delete all spectra of a task.

        Args:
            task:
                The task, or its fingerprint.

        Returns:
            How many there were.

        Raises:
            StoreError:
                If the database fails.
        """
        fingerprint = task if isinstance(task, str) else task.fingerprint
        condition = spectra.c.fingerprint == fingerprint
        return self._database.write(lambda connection: _rows.delete(connection, condition))

    def checkpoint(self, task: FineTuningTask | str, **settings: Any) -> Checkpoint:
        """Return where a long computation keeps what it has finished.

        Args:
            task:
                The task, or its fingerprint.
            settings:
                ``engine``, ``dtype``, ``rank`` and ``explained_trace`` of what is computed.

        Returns:
            Named arrays, which are deleted when that spectrum is stored.
        """
        fingerprint = task if isinstance(task, str) else task.fingerprint
        return Checkpoint(self._database, key_of(fingerprint, settings))

    def get_learned(
        self, fingerprint: str, kind: str, *, settings: Mapping[str, Any] | None = None
    ) -> Learned | None:
        """Return what was learned of a task from its trials.

        Args:
            fingerprint:
                The task's.
            kind:
                What it is, up to 64 characters.
            settings:
                What else tells it apart, a JSON object. Nothing by default.

        Returns:
            The JSON value with its version, or :obj:`None` where there is none.

        Raises:
            StoreError:
                If the database fails.
        """
        return _learned.get(self._database, fingerprint, kind, dict(settings or {}))

    def put_learned(
        self,
        fingerprint: str,
        kind: str,
        payload: Any,
        *,
        version: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> int:
        """Store what was learned, unless another worker was faster.

        Args:
            fingerprint:
                The task's.
            kind:
                What it is, up to 64 characters.
            payload:
                A JSON value, without NaN and infinities.
            version:
                That of what was read and merged into the payload. 0, the default, where nothing
                was there.
            settings:
                What else tells it apart, a JSON object. Nothing by default.

        Returns:
            The new version.

        Raises:
            ValueError:
                If the payload is not JSON.
            LearnedConflictError:
                If another worker stored something since that version.
            StoreError:
                If the database fails.
        """
        names = dict(settings or {})
        return _learned.put(self._database, fingerprint, kind, names, payload, version)

    def update_learned(
        self,
        fingerprint: str,
        kind: str,
        merge: Callable[[Any], Any],
        *,
        settings: Mapping[str, Any] | None = None,
    ) -> Learned:
        """Merge something into what was learned, whoever else does the same.

        Example:
            >>> store.update_learned(fingerprint, "counts", lambda old: (old or 0) + 1).version
            1

        Args:
            fingerprint:
                The task's.
            kind:
                What it is, up to 64 characters.
            merge:
                Makes the new JSON value of the stored one (:obj:`None` where there is none). It is
                called again where another worker was faster.
            settings:
                What else tells it apart, a JSON object. Nothing by default.

        Returns:
            What is stored now.

        Raises:
            ValueError:
                If the merged value is not JSON.
            StoreError:
                If the database fails.
        """
        return _learned.update(self._database, fingerprint, kind, dict(settings or {}), merge)

    def verify(self, *, put_aside: bool = False) -> Verification:
        """Read every spectrum and compare it with its checksums.

        Args:
            put_aside:
                Put damaged ones aside, so that they are computed again. They stay by default, and
                are put aside when they are next asked for.

        Returns:
            What was found.

        Raises:
            StoreError:
                If the database fails.
        """
        return _housekeeping.verify(self._database, self._folder, put_aside)

    def prune(self, *, max_bytes: int | None = None) -> Pruning:
        """Delete what is of no use, and what was not used for longest.

        That is: damaged spectra that lie aside, blocks of computations that nobody has gone on
        with for a week, and arrays that belong to nothing.

        Args:
            max_bytes:
                Delete spectra, those first that were not used for longest, until so much is left,
                but none that somebody works on. No limit by default.

        Returns:
            What was deleted.

        Raises:
            ValueError:
                If the limit is negative.
            StoreError:
                If the database fails.
        """
        _check_limit(max_bytes)
        pruning = _housekeeping.prune(self._database, self._folder, max_bytes)
        if pruning.n_evicted or pruning.n_quarantined or pruning.n_orphaned:
            self._database.vacuum()
        return pruning

    def export_spectrum(self, key: str, path: str | os.PathLike[str]) -> StoredSpectrum:
        """Write a stored spectrum to a file that :meth:`Spectrum.load` reads, too.

        Args:
            key:
                Of a line of :meth:`list`.
            path:
                Where to write.

        Returns:
            What was written.

        Raises:
            KeyError:
                If there is none of this key, or only a damaged one.
            StoreError:
                If the database fails.
        """
        described = {stored.key: stored for stored in self.list()}[key]
        spectrum = self._get(spectra.c.key == key)
        if spectrum is None:
            raise KeyError(key)
        pieces = spectrum.to_pieces(note={"settings": described.settings})
        write_whole(Path(path), pieces)
        return described

    def import_spectrum(self, path: str | os.PathLike[str]) -> Spectrum:
        """Store a spectrum from a file, under the settings it was exported with.

        A file of :meth:`Spectrum.save` is stored under its own engine and precision.

        Args:
            path:
                Where to read.

        Returns:
            The spectrum. One that is there already is kept.

        Raises:
            DamagedSpectrumError:
                If the file is no spectrum.
            StoreError:
                If the database fails.
        """
        spectrum = Spectrum.load(path)
        own = {"engine": spectrum.metadata.engine, "dtype": spectrum.metadata.dtype}
        with Path(path).open("rb") as file:
            is_blob = blob.is_blob(file.read(len(blob.MAGIC)))
            file.seek(0)
            note = blob.read_meta(file).get("note", {}) if is_blob else {}
        try:
            self.put(spectrum, **{**own, **note.get("settings", {})})
        except (AttributeError, TypeError, ValueError) as error:
            raise DamagedSpectrumError(f"The file's settings do not fit: {error}") from error
        return spectrum


def _listed_or_told(row: sa.Row[Any]) -> StoredSpectrum | None:
    try:
        return _rows.listed(row)
    except DamagedSpectrumError as error:
        warn_caller(
            f"The stored spectrum {row.key[:12]}... is left out of the list: {error}. "
            "'optuna-ttp store verify --put-aside' lets it be computed again.",
            DamagedSpectrumWarning,
        )
        return None


def _check_asked(task: FineTuningTask, settings: dict[str, Any]) -> None:
    # Here, not when computing: what is stored would be served under a misspelt setting.
    from optuna_ttp.ntk import compute_spectrum
    from optuna_ttp.task import FineTuningTask

    if not isinstance(task, FineTuningTask):
        raise TypeError(f"task must be a FineTuningTask but got {type(task).__name__}.")
    _, *known = inspect.signature(compute_spectrum).parameters
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(f"compute_spectrum takes {', '.join(known)} but got {', '.join(unknown)}.")


def _check_limit(max_bytes: int | None) -> None:
    if max_bytes is None:
        return
    if not isinstance(max_bytes, Real):
        raise TypeError(f"max_bytes must be a number of bytes but got {max_bytes!r}.")
    if not max_bytes >= 0:
        raise ValueError(f"max_bytes must be nonnegative but got {max_bytes}.")


class _Waiting:
    """Says once in a while for whom and how long this process has been waiting."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0.0

    def tell(self, holding: _lease.Holding) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _MESSAGE_SECONDS
            _logger.info(
                f"Waiting for the spectrum of {self._name!r}: {holding.holder} has been "
                f"computing it for {holding.seconds:.0f} s."
            )
