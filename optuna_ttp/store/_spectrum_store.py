"""The store's public class."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import math
from numbers import Real
import os
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import TYPE_CHECKING

from sqlalchemy.engine import URL

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import write_whole
from optuna_ttp.store import _housekeeping
from optuna_ttp.store import _learned
from optuna_ttp.store._checkpoint import Checkpoint
from optuna_ttp.store._computation import get_or_compute
from optuna_ttp.store._database import Database
from optuna_ttp.store._housekeeping import Pruning
from optuna_ttp.store._housekeeping import Verification
from optuna_ttp.store._identity import check_settings
from optuna_ttp.store._identity import complete
from optuna_ttp.store._identity import key as key_of
from optuna_ttp.store._learned import Learned
from optuna_ttp.store._object_folder import ObjectFolder
from optuna_ttp.store._spectrum_table import SpectrumTable
from optuna_ttp.store._stored_spectrum import StoredSpectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# Without an engine, a spectrum by the first of them is returned.
_ENGINES = ("columns", "exact", "matrix_free")


class SpectrumStore:
    """Keeps spectra in any database that Optuna supports: SQLite, PostgreSQL, MySQL.

    A spectrum is identified by the fingerprint of its task and the settings that shape it. If
    several workers ask for the same one, the first computes it and the others wait for it. A store
    may share the database of an Optuna study, which is what teams should do: its tables begin
    with ``ttp_``, and Optuna's own are not touched.

    Every read is checked: a spectrum of which a bit has changed is put aside with a
    :class:`~optuna_ttp.DamagedSpectrumWarning` and computed again. Every method raises
    :exc:`~optuna_ttp.StoreError` if the database fails.

    Example:
        >>> with SpectrumStore("sqlite:///ttp.db") as store:
        ...     spectrum = store.get_or_compute(task, explained_trace=0.999)
        ...     store.list()[0].rank == spectrum.rank
        True

    Args:
        url:
            A database URL. A SQLite file in the user's cache folder by default.
        object_folder:
            A folder that all workers see. Large arrays go to files in it instead of to the
            database. No folder by default.
        object_threshold:
            Bytes from which arrays count as large. 64 MiB by default.
        max_bytes:
            Bytes that the store may hold. Beyond them the least recently used spectra are
            deleted, except those that a worker is computing. No limit by default.
        lease_seconds:
            Seconds, by the database's clock, after which a worker that computes a spectrum but
            no longer prolongs its lease is taken for dead. A minute by default.

    Raises:
        TypeError:
            If a number is of the wrong type.
        ValueError:
            If a number is out of its range.
        StoreError:
            If the database cannot be opened. No password appears in the message.
        StoreVersionError:
            If the store was made by another version of this package, with unknown tables.
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
        folder = None if object_folder is None else ObjectFolder(object_folder)
        self._table = SpectrumTable(self._database, folder, object_threshold, max_bytes)
        self._lease_seconds = lease_seconds

    def __repr__(self) -> str:
        return f"SpectrumStore({self._database.shown!r})"

    def __enter__(self) -> SpectrumStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the database.

        Using the store afterwards opens new ones. A database in memory ends with its connections:
        using it afterwards raises :exc:`~optuna_ttp.StoreError`.
        """
        self._database.close()

    def get_or_compute(
        self,
        task: FineTuningTask,
        *,
        instead_of_waiting: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Spectrum:
        """Return the task's spectrum, computing and storing it if it is not there yet.

        If another worker is computing it, this one waits and logs that once in a while. If that
        worker dies, a waiting one computes it. With ``distributed=True`` the first process of the
        group reads and stores for all of them, and none waits.

        Args:
            task:
                The task to fine-tune.
            instead_of_waiting:
                Settings of a cheaper spectrum to continue with if another worker is computing
                the requested one; they replace those in ``settings``. Waits by default.
            settings:
                Keyword arguments of :func:`~optuna_ttp.compute_spectrum`. Engine, precision and
                truncation, and of a sample of columns its seed and the number of columns that
                memory allows, identify the spectrum; the others only matter when computing. The
                time of a step is measured, and the linearisation probed, if the stored spectrum
                lacks it.

        Returns:
            The spectrum.

        Raises:
            TypeError:
                If ``task`` is no :class:`~optuna_ttp.FineTuningTask`, or a setting is unknown.
            ValueError:
                If ``instead_of_waiting`` does not lead to another spectrum.
        """
        from optuna_ttp.ntk import compute_spectrum

        return get_or_compute(
            self._table, task, compute_spectrum, self._lease_seconds, instead_of_waiting, settings
        )

    def get(self, task: FineTuningTask | str, **settings: Any) -> Spectrum | None:
        """Return a stored spectrum.

        Args:
            task:
                The task, or its fingerprint.
            settings:
                ``engine``, ``dtype``, ``rank`` and ``explained_trace`` of its computation. Without
                ``engine``, the first that is there of ``"columns"``, ``"exact"`` and
                ``"matrix_free"``.

        Returns:
            The spectrum, or :obj:`None` if there is none, or only a damaged one, which is put
            aside with a warning.

        Raises:
            FingerprintMismatchError:
                If the stored arrays belong to another task.
        """
        fingerprint = _fingerprint(task)
        engines = (settings["engine"],) if "engine" in settings else _ENGINES
        for engine in engines:
            spectrum = self._table.get(fingerprint, {**settings, "engine": engine})
            if spectrum is not None:
                return spectrum
        return None

    def put(self, spectrum: Spectrum, *, overwrite: bool = False, **settings: Any) -> None:
        """Store a spectrum.

        Args:
            spectrum:
                The spectrum to store.
            overwrite:
                Replace a stored one of the same task and settings. The stored one stays by
                default.
            settings:
                ``dtype``, ``rank`` and ``explained_trace`` of its computation. Engine and seed are
                the spectrum's.

        Raises:
            TypeError:
                If ``spectrum`` is no spectrum, or a setting is unknown.
            ValueError:
                If the spectrum was not computed with these settings.
        """
        if not isinstance(spectrum, Spectrum):
            raise TypeError(f"spectrum must be a Spectrum but got {type(spectrum).__name__}.")
        complete(settings)
        check_settings(spectrum, settings)
        origin: dict[str, Any] = {"engine": spectrum.metadata.engine}
        if spectrum.metadata.seed is not None:
            origin["seed"] = spectrum.metadata.seed
        self._table.put(spectrum, {**origin, **settings}, overwrite=overwrite)

    def list(self) -> list[StoredSpectrum]:
        """Return descriptions of the stored spectra, oldest first, without reading the arrays.

        A spectrum whose description cannot be read is left out with a
        :class:`~optuna_ttp.DamagedSpectrumWarning`.
        """
        return self._table.list()

    def delete(self, task: FineTuningTask | str) -> int:
        """Delete all spectra of a task.

        Args:
            task:
                The task, or its fingerprint.

        Returns:
            The number of deleted spectra.
        """
        return self._table.delete(_fingerprint(task))

    def checkpoint(self, task: FineTuningTask | str, **settings: Any) -> Checkpoint:
        """Return the checkpoint that stores the finished parts of a spectrum's computation.

        Args:
            task:
                The task, or its fingerprint.
            settings:
                ``engine``, ``dtype``, ``rank`` and ``explained_trace`` of the computation.

        Returns:
            A store of named arrays, which are deleted when that spectrum is stored.
        """
        return Checkpoint(self._database, key_of(_fingerprint(task), settings))

    def get_learned(
        self, fingerprint: str, kind: str, *, settings: Mapping[str, Any] | None = None
    ) -> Learned | None:
        """Return a value that was learned of a task from its trials.

        Args:
            fingerprint:
                The task's fingerprint.
            kind:
                The name of the kind of value, up to 64 characters.
            settings:
                A JSON object that distinguishes values of the same kind. Empty by default.

        Returns:
            The JSON value with its version, or :obj:`None` if there is none.
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
        """Store a value learned of a task, unless another worker has stored a newer version.

        Args:
            fingerprint:
                The task's fingerprint.
            kind:
                The name of the kind of value, up to 64 characters.
            payload:
                A JSON value, without NaN and infinities.
            version:
                The stored version that the payload replaces. 0, the default, if none is stored.
            settings:
                A JSON object that distinguishes values of the same kind. Empty by default.

        Returns:
            The new version, ``version + 1``.

        Raises:
            ValueError:
                If the payload is not JSON.
            LearnedConflictError:
                If the stored version is another one.
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
        """Change a value learned of a task, also while other workers do the same.

        Example:
            >>> store.update_learned(fingerprint, "counts", lambda old: (old or 0) + 1).version
            1

        Args:
            fingerprint:
                The task's fingerprint.
            kind:
                The name of the kind of value, up to 64 characters.
            merge:
                A function from the stored JSON value (:obj:`None` if there is none) to the new
                one. It is called again if another worker was faster.
            settings:
                A JSON object that distinguishes values of the same kind. Empty by default.

        Returns:
            The JSON value that is stored now, with its version.

        Raises:
            ValueError:
                If the merged value is not JSON.
        """
        return _learned.update(self._database, fingerprint, kind, dict(settings or {}), merge)

    def verify(self, *, put_aside: bool = False) -> Verification:
        """Read every spectrum and compare it with its checksums.

        Args:
            put_aside:
                Put damaged spectra aside, so that they are computed again. By default they stay
                until they are next read, which puts them aside.

        Returns:
            The number of spectra that were checked, and the faults of the damaged ones.
        """
        return _housekeeping.verify(self._database, self._table.folder, put_aside)

    def prune(self, *, max_bytes: int | None = None) -> Pruning:
        """Delete unused data, and on request the least recently used spectra.

        Unused are damaged spectra that were put aside, blocks of computations that no worker has
        continued for a week, and arrays that belong to no spectrum and no computation.

        Args:
            max_bytes:
                Delete the least recently used spectra until at most this many bytes are left, but
                none that a worker is computing. No limit by default.

        Returns:
            The numbers of deleted spectra, computations, arrays and bytes.

        Raises:
            ValueError:
                If the limit is negative.
        """
        _check_limit(max_bytes)
        pruning = _housekeeping.prune(self._database, self._table.folder, max_bytes)
        if pruning.n_evicted or pruning.n_quarantined or pruning.n_orphaned:
            self._database.vacuum()
        return pruning

    def export_spectrum(self, key: str, path: str | os.PathLike[str]) -> StoredSpectrum:
        """Write a stored spectrum to a file that :meth:`Spectrum.load` reads, too.

        Args:
            key:
                The key of an entry of :meth:`list`.
            path:
                The file to write.

        Returns:
            The entry of :meth:`list`.

        Raises:
            KeyError:
                If there is no spectrum of this key, or only a damaged one.
        """
        described = {stored.key: stored for stored in self.list()}.get(key)
        spectrum = None if described is None else self._table.get_by_key(key)
        if described is None or spectrum is None:
            raise KeyError(
                f"key must be that of a line of SpectrumStore.list() but got {key!r}, under which "
                "no undamaged spectrum is stored."
            )
        pieces = spectrum.to_pieces(note={"settings": described.settings})
        write_whole(Path(path), pieces)
        return described

    def import_spectrum(self, path: str | os.PathLike[str]) -> Spectrum:
        """Store a spectrum from a file, under the settings it was exported with.

        A file of :meth:`Spectrum.save` is stored under its own engine and precision.

        Args:
            path:
                The file to read.

        Returns:
            The spectrum. A stored one of the same task and settings stays.

        Raises:
            DamagedSpectrumError:
                If the file is no spectrum, or one of another version's format.
        """
        spectrum = Spectrum.load(path)
        metadata = spectrum.metadata
        with Path(path).open("rb") as file:
            note = blob.read_meta(file).get("note", {})
        try:
            computed_with = {"engine": metadata.engine, "dtype": metadata.dtype}
            self.put(spectrum, **{**computed_with, **note.get("settings", {})})
        except (AttributeError, TypeError, ValueError) as error:
            raise DamagedSpectrumError(f"The file's settings do not fit: {error}") from error
        return spectrum


def _fingerprint(task: FineTuningTask | str) -> str:
    """Return the fingerprint of a task, which may be given as its fingerprint."""
    return task if isinstance(task, str) else task.fingerprint


def _check_limit(max_bytes: int | None) -> None:
    """Raise TypeError if a limit of bytes is no number, ValueError if it is negative."""
    if max_bytes is None:
        return
    if not isinstance(max_bytes, Real):
        raise TypeError(f"max_bytes must be a number of bytes but got {max_bytes!r}.")
    if not max_bytes >= 0:
        raise ValueError(f"max_bytes must be nonnegative but got {max_bytes}.")
