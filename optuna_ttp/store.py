"""Spectra in a database, so that each is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
import hashlib
import json
import os
from pathlib import Path
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna.logging import get_logger
import platformdirs
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.engine import URL

from optuna_ttp.exceptions import FingerprintMismatchError
from optuna_ttp.exceptions import StoreError
from optuna_ttp.spectrum import check_truncation
from optuna_ttp.spectrum import Spectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


_logger = get_logger("optuna.ttp.store")

_metadata = sa.MetaData()
_spectra = sa.Table(
    "ttp_spectra",
    _metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False, index=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("n_samples", sa.Integer, nullable=False),
    sa.Column("n_outputs", sa.Integer, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("compute_seconds", sa.Float, nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    # MySQL's plain BLOB ends at 64 KiB.
    sa.Column(
        "data",
        sa.LargeBinary().with_variant(sa.LargeBinary(2**32 - 1), "mysql", "mariadb"),
        nullable=False,
    ),
)
# What changes the arrays. Where and how fast they are computed does not.
_SETTING_DEFAULTS: dict[str, Any] = {
    "engine": "exact",
    "dtype": "float32",
    "rank": None,
    "explained_trace": None,
}


@dataclass(frozen=True)
class StoredSpectrum:
    """A line of :meth:`SpectrumStore.list`.

    Attributes:
        fingerprint:
            The task's fingerprint.
        name:
            The task's name.
        settings:
            Engine, precision and truncation.
        n_samples:
            N.
        n_outputs:
            C.
        rank:
            The number of eigenpairs.
        compute_seconds:
            What it took to compute.
        created_at:
            When, in ISO 8601, UTC.
        n_bytes:
            Size of the stored arrays.
    """

    fingerprint: str
    name: str
    settings: dict[str, Any]
    n_samples: int
    n_outputs: int
    rank: int
    compute_seconds: float
    created_at: str
    n_bytes: int


class SpectrumStore:
    """Keeps spectra in any database that SQLAlchemy reaches.

    A spectrum is found by the fingerprint of its task and the settings that shape it. It may share
    the database of an Optuna storage: its one table is called ``ttp_spectra``.

    Example:
        >>> store = SpectrumStore("sqlite:///ttp.db")
        >>> spectrum = store.get_or_compute(task, explained_trace=0.999)
        >>> store.list()[0].rank == spectrum.rank
        True

    Args:
        url:
            A database URL. A SQLite file in the user's cache folder by default.

    Raises:
        StoreError:
            If the database cannot be opened. No password appears in the message.
    """

    def __init__(self, url: str | URL | None = None) -> None:
        try:
            self._url = make_url(_default_url() if url is None else url)
            if self._url.get_backend_name() != "sqlite" and "@" in (
                f"{self._url.host}{self._url.database}{self._url.query}"
            ):
                raise ValueError("Part of a password was taken for something else.")
        except (sa.exc.ArgumentError, ValueError):
            # The text may hold a password: neither it nor its cause is repeated.
            raise StoreError(
                "The store's URL must look like 'sqlite:///ttp.db' or "
                "'postgresql://user:password@host/database' (with '@' in a password written as "
                "%40) but could not be read."
            ) from None
        self._engine = self._open()

    def __repr__(self) -> str:
        return f"SpectrumStore({_without_secrets(self._url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._url = state["_url"]
        self._engine = self._open()

    def get_or_compute(self, task: FineTuningTask, **settings: Any) -> Spectrum:
        """Return the task's spectrum, computing and storing it where it is not there yet.

        Args:
            task:
                What is fine-tuned.
            settings:
                Keyword arguments of :func:`~optuna_ttp.compute_spectrum`. Engine, precision and
                truncation belong to what is looked for; the others only matter when computing.
                The time of a step is measured, and the linearisation probed, where the stored
                spectrum lacks it.

        Returns:
            The spectrum.

        Raises:
            StoreError:
                If the database fails.
        """
        from optuna_ttp.jacobian import resolve_engine

        budget = {k: settings[k] for k in ("max_memory",) if k in settings}
        engine, _ = resolve_engine(task, settings.get("engine", "auto"), **budget)
        settings = {**settings, "engine": engine}
        identity = {k: settings[k] for k in _SETTING_DEFAULTS if k in settings}
        started = time.perf_counter()
        stored = self.get(task, **identity)
        if stored is not None:
            _logger.info(
                f"Read the spectrum of {task.name!r} in {time.perf_counter() - started:.2f} s; "
                f"computing it took {stored.metadata.compute_seconds:.1f} s."
            )
            return self._completed(task, stored, identity, settings)
        from optuna_ttp.jacobian import compute_spectrum

        spectrum = compute_spectrum(task, **settings)
        self.put(spectrum, **identity)
        _logger.info(
            f"Computed the spectrum of {task.name!r} in {spectrum.metadata.compute_seconds:.1f} s "
            "and stored it."
        )
        return spectrum

    def _completed(
        self,
        task: FineTuningTask,
        stored: Spectrum,
        identity: dict[str, Any],
        settings: dict[str, Any],
    ) -> Spectrum:
        """Add what an older or hastier computation left out."""
        from optuna_ttp.jacobian import probe_linearisation
        from optuna_ttp.jacobian import resolve_device
        from optuna_ttp.throughput import measure_throughput

        if stored.probe is None and settings.get("probe", True):
            device = resolve_device(task, settings.get("device"))
            stored = probe_linearisation(task, stored, device=device)
            self.put(stored, overwrite=True, **identity)
        if stored.throughput is None and settings.get("measure_speed", True):
            device = resolve_device(task, settings.get("device"))
            return replace(stored, throughput=measure_throughput(task, device=device))
        return stored

    def get(self, task: FineTuningTask | str, **settings: Any) -> Spectrum | None:
        """Return a stored spectrum.

        Args:
            task:
                The task, or its fingerprint.
            settings:
                ``engine``, ``dtype``, ``rank`` and ``explained_trace`` as it was computed with.

        Returns:
            The spectrum, or :obj:`None` where there is none.

        Raises:
            FingerprintMismatchError:
                If the stored arrays belong to another task.
            StoreError:
                If the database fails, or the stored bytes are damaged.
        """
        fingerprint = task if isinstance(task, str) else task.fingerprint
        query = sa.select(_spectra.c.data, _spectra.c.checksum).where(
            _spectra.c.key == _key(fingerprint, settings)
        )
        with self._connection("read") as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        if hashlib.sha256(row.data).hexdigest() != row.checksum:
            raise StoreError(
                f"The stored spectrum {fingerprint[:12]}... is damaged: its checksum does not "
                "match. Delete it and compute it again."
            )
        try:
            spectrum = Spectrum.from_bytes(row.data)
        except ValueError as error:
            raise StoreError(f"The stored spectrum {fingerprint[:12]}...: {error}") from error
        if spectrum.metadata.fingerprint != fingerprint:
            raise FingerprintMismatchError(
                f"The stored spectrum must belong to the task {fingerprint[:12]}... but got one "
                f"of {spectrum.metadata.fingerprint[:12]}..."
            )
        return spectrum

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
        _complete(settings)
        _check_settings(spectrum, settings)
        metadata = spectrum.metadata
        data = spectrum.to_bytes()
        key = _key(metadata.fingerprint, settings)
        row = {
            "key": key,
            "fingerprint": metadata.fingerprint,
            "name": metadata.name[:255],
            "settings": json.dumps(_complete(settings), sort_keys=True),
            "n_samples": spectrum.n_samples,
            "n_outputs": spectrum.n_outputs,
            "rank": spectrum.rank,
            "compute_seconds": metadata.compute_seconds,
            "created_at": metadata.created_at,
            "checksum": hashlib.sha256(data).hexdigest(),
            "data": data,
        }
        with self._connection("write") as connection:
            if overwrite:
                connection.execute(_spectra.delete().where(_spectra.c.key == key))
            present = sa.select(_spectra.c.key).where(_spectra.c.key == key)
            if connection.execute(present).first() is not None:
                return
            try:
                with connection.begin_nested():
                    connection.execute(_spectra.insert().values(row))
            except sa.exc.IntegrityError:
                _logger.debug("Another process stored the same spectrum first.")

    def list(self) -> list[StoredSpectrum]:
        """Return what is stored, oldest first, without reading the arrays.

        Raises:
            StoreError:
                If the database fails.
        """
        columns = [c for c in _spectra.c if c.name not in ("key", "checksum", "data")]
        query = sa.select(*columns, sa.func.length(_spectra.c.data).label("n_bytes")).order_by(
            _spectra.c.created_at, _spectra.c.key
        )
        with self._connection("read") as connection:
            rows = connection.execute(query).mappings().all()
        return [StoredSpectrum(**{**row, "settings": json.loads(row["settings"])}) for row in rows]

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
        statement = _spectra.delete().where(_spectra.c.fingerprint == fingerprint)
        with self._connection("write") as connection:
            return int(connection.execute(statement).rowcount)

    def _open(self) -> sa.Engine:
        arguments: dict[str, Any] = {}
        if self._url.get_backend_name() == "sqlite":
            arguments["connect_args"] = {"timeout": 60}
            if _is_in_memory(self._url):
                # All threads must see the same database, which lives as long as its connection.
                arguments["poolclass"] = sa.StaticPool
                arguments["connect_args"]["check_same_thread"] = False
        try:
            engine = sa.create_engine(self._url, **arguments)
            if self._url.get_backend_name() == "sqlite":
                _make_private_file(self._url)
            # Two processes may both find no table; the loser of that race finds it the next time.
            try:
                _metadata.create_all(engine)
            except (sa.exc.OperationalError, sa.exc.ProgrammingError):
                _metadata.create_all(engine)
        except (sa.exc.SQLAlchemyError, ImportError, OSError, TypeError, ValueError) as error:
            raise self._failure("open", error) from None
        return engine

    @contextmanager
    def _connection(self, verb: str) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise self._failure(verb, error) from None

    def _failure(self, verb: str, error: Exception) -> StoreError:
        reason = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        for secret in (self._url.password, *self._url.query.values()):
            if secret:
                reason = reason.replace(str(secret), "***")
        if isinstance(error, ModuleNotFoundError):
            reason += ". Install the database's driver"
        return StoreError(f"Could not {verb} the store {_without_secrets(self._url)}: {reason}.")


def _default_url() -> str:
    folder = Path(platformdirs.user_cache_dir("optuna_ttp", appauthor=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"Could not make the cache folder {folder}: {error}") from error
    return f"sqlite:///{folder / 'spectra.db'}"


def _without_secrets(url: URL) -> str:
    # Some drivers take a password in the query, too.
    return url.set(query={}).render_as_string(hide_password=True)


def _is_in_memory(url: URL) -> bool:
    return url.database in (None, "", ":memory:") or "mode=memory" in str(url)


def _make_private_file(url: URL) -> None:
    """A new SQLite file can be read and written by its owner alone."""
    if _is_in_memory(url) or str(url.database).startswith("file:"):
        return
    try:
        os.close(os.open(str(url.database), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except OSError:
        # It is there already, or cannot be made: opening it says why.
        return


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - set(_SETTING_DEFAULTS))
    if unknown:
        raise TypeError(
            f"The settings of a stored spectrum are {', '.join(_SETTING_DEFAULTS)} but got "
            f"{', '.join(unknown)}."
        )
    check_truncation(settings.get("rank"), settings.get("explained_trace"))
    # NumPy's numbers, which JSON does not know, name the same spectrum as Python's.
    kinds = {"rank": int, "explained_trace": float}
    plain = {k: kinds[k](v) if k in kinds and v is not None else v for k, v in settings.items()}
    return {**_SETTING_DEFAULTS, **plain}


def _check_settings(spectrum: Spectrum, settings: dict[str, Any]) -> None:
    """Refuse to file a spectrum where another one would be looked for."""
    made = {"engine": spectrum.metadata.engine, "dtype": spectrum.metadata.dtype}
    for name, value in made.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"The spectrum was computed with {name}={value!r} but got {name}="
                f"{settings[name]!r} to store it under."
            )
    rank = settings.get("rank")
    if rank is not None and spectrum.rank > rank:
        raise ValueError(
            f"The spectrum has rank {spectrum.rank} but got rank={rank} to store it under. "
            "Truncate it first."
        )


def _key(fingerprint: str, settings: dict[str, Any]) -> str:
    text = json.dumps([fingerprint, _complete(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
