"""Computing each spectrum once, by one of many workers, while the others wait for it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
import inspect
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna.logging import get_logger

from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import _lease
from optuna_ttp.store._checkpoint import Checkpoint
from optuna_ttp.store._identity import complete
from optuna_ttp.store._identity import key as key_of
from optuna_ttp.store._identity import SETTING_DEFAULTS
from optuna_ttp.store._kernel_blocks import KernelBlocks
from optuna_ttp.store._rules import RULES
from optuna_ttp.store._spectrum_table import SpectrumTable


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


_logger = get_logger("optuna.ttp.store")


def get_or_compute(
    table: SpectrumTable,
    task: FineTuningTask,
    compute: Callable[..., Spectrum],
    lease_seconds: float,
    instead_of_waiting: Mapping[str, Any] | None,
    settings: dict[str, Any],
) -> Spectrum:
    """Return a task's spectrum, stored or computed; see :meth:`SpectrumStore.get_or_compute`.

    ``compute`` is :func:`~optuna_ttp.compute_spectrum`.
    """
    from optuna_ttp.ntk import column_limit
    from optuna_ttp.ntk import in_all
    from optuna_ttp.ntk import resolve_engine

    budget = {k: settings[k] for k in ("max_memory",) if k in settings}

    def resolved() -> str:
        _check_asked(task, compute, {**settings, **(instead_of_waiting or {})})
        return resolve_engine(task, settings.get("engine", "auto"), **budget)[0]

    is_distributed = settings.get("distributed", False)
    settings = {**settings, "engine": in_all(resolved, distributed=is_distributed)}
    identity = {k: settings[k] for k in SETTING_DEFAULTS if k in settings}
    if settings["engine"] == "columns":
        identity["max_columns"] = column_limit(task, settings.get("dtype", "float32"), **budget)
    computation = _Computation(table, task, compute, lease_seconds, identity, settings)
    if is_distributed:
        return computation.by_all()
    spectrum = computation.by_one(wait=instead_of_waiting is None)
    if spectrum is not None:
        return spectrum
    changes = dict(instead_of_waiting or {})
    _check_cheaper(settings, changes)
    _logger.info(
        f"Another worker is computing the spectrum of {task.name!r}; this one continues with "
        f"{changes}."
    )
    return get_or_compute(table, task, compute, lease_seconds, None, {**settings, **changes})


class _Computation:
    """Reads one task's spectrum from the store, or computes it, for one set of settings.

    ``identity`` holds the settings that shape the arrays, and ``settings`` all keyword arguments
    of ``compute``.
    """

    def __init__(
        self,
        table: SpectrumTable,
        task: FineTuningTask,
        compute: Callable[..., Spectrum],
        lease_seconds: float,
        identity: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        self._table = table
        self._task = task
        self._compute = compute
        # Hashed once: the weights do not change meanwhile.
        self._fingerprint = task.fingerprint
        self._key = key_of(self._fingerprint, identity)
        self._lease_seconds = lease_seconds
        self._identity = identity
        self._settings = settings
        self._next_message = 0.0

    def by_one(self, *, wait: bool) -> Spectrum | None:
        """Return the stored spectrum, or compute it under a lease.

        If another worker has the lease, wait until it ends, or without ``wait`` return None.
        """
        started = time.perf_counter()
        while True:
            stored = self._stored()
            lease = None if stored is not None else self._acquire()
            if lease is not None:
                with lease:
                    # Another worker may have stored it just before the lease was acquired.
                    stored = self._stored()
                    if stored is None:
                        return self._computed()
            if stored is not None:
                _logger.info(
                    f"Read the spectrum of {self._task.name!r} in "
                    f"{time.perf_counter() - started:.2f} s; computing it took "
                    f"{stored.metadata.compute_seconds:.1f} s."
                )
                return self._completed(stored)
            if not wait:
                return None
            self._wait()

    def by_all(self) -> Spectrum:
        """Return the spectrum in each process of a group; only the first one reads and stores it.

        There is no lease, because its holder and the other processes would wait for each other.
        """
        from optuna_ttp.ntk import by_first
        from optuna_ttp.ntk import check_same_task

        switches = {name: self._settings.get(name, True) for name in ("measure_speed", "probe")}
        check_same_task(self._task, {**self._identity, **switches})
        stored = by_first(self._stored)
        if stored is not None:
            # Only one process completes it, so that all have the same numbers.
            return by_first(lambda: self._completed(stored))
        spectrum = self._compute(self._task, **self._settings)
        by_first(lambda: self._table.put(spectrum, self._identity))
        return spectrum

    def _stored(self) -> Spectrum | None:
        return self._table.get(self._fingerprint, self._identity)

    def _acquire(self) -> _lease.Lease | None:
        return _lease.acquire(self._table.database, self._key, self._lease_seconds)

    def _computed(self) -> Spectrum:
        """Compute and store the spectrum; return it, or another worker's that was stored first."""
        settings = self._settings
        checkpoint = Checkpoint(self._table.database, self._key)
        if settings["engine"] == "exact" and settings.get("checkpoint") is None:
            settings = {**settings, "checkpoint": KernelBlocks(checkpoint)}
        spectrum = self._compute(self._task, **settings)
        if not self._table.put(spectrum, self._identity):
            # Another worker took this one for dead and was faster. All must continue with the same
            # numbers, and the blocks that this worker saved after that are not needed.
            checkpoint.clear()
            return self._stored() or spectrum
        _logger.info(
            f"Computed the spectrum of {self._task.name!r} in "
            f"{spectrum.metadata.compute_seconds:.1f} s and stored it."
        )
        return spectrum

    def _completed(self, stored: Spectrum) -> Spectrum:
        """Return a stored spectrum, adding its probe and seconds per step if they are wanted."""
        from optuna_ttp.ntk import resolve_device
        from optuna_ttp.spectrum import measure_throughput

        incomplete = stored.probe is None or stored.saturation is None
        if incomplete and self._settings.get("probe", True):
            stored = self._probed(stored)
        if stored.throughput is None and self._settings.get("measure_speed", True):
            device = resolve_device(self._task, self._settings.get("device"))
            return replace(stored, throughput=measure_throughput(self._task, device=device))
        return stored

    def _probed(self, stored: Spectrum) -> Spectrum:
        """Return the spectrum with its probe and saturation, and replace the stored one by it."""
        from optuna_ttp.ntk import measure_saturation
        from optuna_ttp.ntk import probe_linearisation
        from optuna_ttp.ntk import resolve_device

        while True:
            lease = self._acquire()
            if lease is None:
                self._wait()
                continue
            with lease:
                current = self._stored()
                if current is not None and current.probe is not None and current.saturation:
                    return current
                stored = current or stored
                device = resolve_device(self._task, self._settings.get("device"))
                if stored.probe is None:
                    stored = probe_linearisation(self._task, stored, device=device)
                saturation = measure_saturation(self._task, stored, device=device)
                stored = replace(stored, saturation=saturation)
                self._table.put(stored, self._identity, overwrite=True)
                return stored

    def _wait(self) -> None:
        """Wait until no worker has the key's lease; log now and then which worker has it."""
        pause = RULES.shortest_wait_seconds
        while True:
            holding = _lease.holding(self._table.database, self._key)
            if holding is None:
                return
            if time.monotonic() >= self._next_message:
                self._next_message = time.monotonic() + RULES.message_seconds
                _logger.info(
                    f"Waiting for the spectrum of {self._task.name!r}: {holding.holder} has been "
                    f"computing it for {holding.seconds:.0f} s."
                )
            time.sleep(pause)
            pause = min(1.5 * pause, RULES.longest_wait_seconds)


def _check_asked(
    task: FineTuningTask, compute: Callable[..., Spectrum], settings: dict[str, Any]
) -> None:
    """Raise TypeError if ``task`` is no task, or a setting is not an argument of ``compute``.

    ``compute`` itself would not notice a misspelt setting if the spectrum is already stored.
    """
    from optuna_ttp.task import check_task

    check_task(task)
    _, *known = inspect.signature(compute).parameters
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(f"compute_spectrum takes {', '.join(known)} but got {', '.join(unknown)}.")


def _check_cheaper(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Raise ValueError if settings with the changes identify the same spectrum as without."""
    first, second = (
        complete({k: s[k] for k in SETTING_DEFAULTS if k in s})
        for s in (settings, {**settings, **changes})
    )
    if first == second:
        raise ValueError(
            "instead_of_waiting must change engine, dtype, rank or explained_trace but got "
            f"{changes!r}."
        )
