"""Planning a spectrum: a few samples are timed, and seconds and bytes of the rest estimated."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
import time
from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.checks import check_seed
from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.ntk._devices import resolve_device
from optuna_ttp.ntk._devices import resolve_dtype
from optuna_ttp.ntk._plan import LayerPlan
from optuna_ttp.ntk._plan import SpectrumPlan
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._choice import check_sketch_memory
from optuna_ttp.ntk.engines._choice import resolve_engine
from optuna_ttp.ntk.engines._exact import choose_grouping
from optuna_ttp.ntk.engines._exact import expected_bytes
from optuna_ttp.ntk.engines._exact import Grouping
from optuna_ttp.ntk.engines._matrix_free import by_directions
from optuna_ttp.ntk.engines._matrix_free import check_vectors_memory
from optuna_ttp.ntk.engines._matrix_free import columns_of
from optuna_ttp.ntk.engines._matrix_free import probes_of
from optuna_ttp.ntk.engines._matrix_free import sketch_width
from optuna_ttp.ntk.engines._rules import CHOICE
from optuna_ttp.ntk.engines._rules import SKETCHES
from optuna_ttp.ntk.engines._sketch import Passes
from optuna_ttp.ntk.jacobian._directions import Directions
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.ntk.jacobian._rules import LAYOUTS
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.spectrum import check_truncation
from optuna_ttp.task import check_task


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# With this number of timed samples, the fixed costs of a batch are a small part.
_N_TIMED = 12
_MATRIX = 1024
# This is the usual number of blocks of products of the matrix-free engine.
_N_BLOCKS = 2
# This number of directions is timed.
_N_DIRECTIONS = 4


@dataclass(frozen=True)
class _Estimate:
    """Claims and layout (None without rows), grouping, and the estimated seconds and bytes."""

    preparation: Preparation | None
    seconds: float
    grouping: Grouping
    n_bytes: int
    trace_seconds: float = 0.0


@without_autocast
def plan_spectrum(
    task: FineTuningTask,
    *,
    engine: str = "auto",
    rank: int | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    max_memory: int = 4 * 2**30,
    seed: int = 0,
) -> SpectrumPlan:
    """Estimate how a spectrum would be computed, in what time and memory, without computing it.

    The derivatives of a few samples and a matrix product are timed, and extrapolated. On a CPU the
    seconds exclude the processor time of other programs. They exclude the eigenvectors, the timing
    of training steps and the probe. For a sketch they are for the narrowest one, which is repeated
    with twice the width while its error bar is too large; for the matrix-free engine they are for
    two blocks of products, which most spectra take.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> task = FineTuningTask(model, (torch.randn(8, 3), torch.randint(2, (8,))))
        >>> plan = plan_spectrum(task)
        >>> plan.engine
        'exact'

    Args:
        task:
            The model with its data and loss.
        engine:
            The engine, as for :func:`~optuna_ttp.compute_spectrum`. ``"auto"`` by default.
        rank:
            The number of eigenpairs of the matrix-free engine. 100 by default.
        dtype:
            The precision, as for :func:`~optuna_ttp.compute_spectrum`. ``"float32"`` by default.
        device:
            The device. By default a GPU if one is available, else the model's.
        max_memory:
            The memory budget for rows of the Jacobian and the kernel in bytes. 4 GiB by default.
        seed:
            The seed of the random directions in which gradients are compared. Zero by default.

    Returns:
        The plan: engine, seconds, bytes, and one entry per parameter; printing it shows a table.

    Raises:
        TypeError:
            If the task is not a :class:`FineTuningTask`, or the memory budget not a number.
        ValueError:
            If a setting is out of its range, the task cannot be differentiated, or the memory does
            not suffice; the message says how much would.
    """
    check_task(task)
    check_truncation(rank, None)
    seed = check_seed(seed)
    name, reason = resolve_engine(task, engine, max_memory=max_memory)
    kind, held = resolve_dtype(dtype, name)
    settings = EngineSettings(
        resolve_device(task, device), kind, held, max_memory, seed, show_progress_bar=False
    )
    planner = _Planner(task, settings)
    if name == "exact":
        estimate = planner.exact()
    elif name == "matrix_free":
        estimate = planner.matrix_free(rank)
    else:
        estimate = planner.sketch(refined=name == "refined_sketch")
    grouping = estimate.grouping
    if estimate.n_bytes > max_memory:
        reason += (
            f"; the peak is above max_memory of {max_memory / 2**20:,.3g} MiB, which limits rows "
            "and kernel, but not the activations and gradients of a batch"
        )
    return SpectrumPlan(
        engine=name,
        reason=reason,
        n_samples=task.n_samples,
        n_outputs=task.n_outputs,
        n_parameters=task.n_parameters,
        seconds=estimate.seconds,
        trace_seconds=estimate.trace_seconds,
        bytes=estimate.n_bytes,
        batch_size=grouping.batch,
        block_size=grouping.held,
        stream_size=grouping.streamed,
        minimum_bytes=grouping.minimum,
        layers=() if estimate.preparation is None else _layers(task, estimate.preparation),
    )


class _Planner:
    """Estimates seconds and bytes of each engine for one task with one set of settings."""

    def __init__(self, task: FineTuningTask, settings: EngineSettings) -> None:
        self._task, self._settings = task, settings
        self._device, self._dtype = settings.device, settings.dtype
        self._n_rows = task.n_samples * task.n_outputs
        self._itemsize = self._dtype.itemsize
        self._n_timed = min(_N_TIMED, task.n_samples)
        self._few = task.subset(self._n_timed)
        n_held_out = 0 if task.validation is None else task.validation.n_samples
        self._n_read = task.n_samples + n_held_out

    def exact(self) -> _Estimate:
        """Return the estimate for the exact engine, from timed derivatives of a few samples."""
        task, device, dtype = self._task, self._device, self._dtype

        def measure(lifts: Mapping[str, int]) -> _Estimate:
            clock = _Clock(device)
            reference = task.initial_outputs(device, dtype)
            with task.frozen(device, dtype) as frozen:
                check_singles(task, frozen, reference, self._settings)
                preparation = prepare(task, frozen, self._settings, lifts)
                setup = clock.seconds()
                grouping = choose_grouping(task, preparation, self._settings)
                with preparation.claims.tape(frozen).attached() as tape:
                    reader = SampleReader(
                        task,
                        frozen,
                        preparation.claims,
                        tape,
                        self._settings,
                        batch_size=min(grouping.batch, self._n_timed),
                        reference=reference,
                    )
                    seconds = _fastest(
                        lambda: reader.read(preparation.layout, 0, self._n_timed), device, 2
                    )
            total = setup + _exact_seconds(
                task,
                preparation,
                grouping,
                seconds / self._n_timed,
                _flops_per_second(device, dtype),
            )
            return _Estimate(
                preparation, total, grouping, expected_bytes(task, preparation, grouping, dtype)
            )

        return lifting(measure)

    def sketch(self, *, refined: bool) -> _Estimate:
        """Return the estimate for the narrowest sketch, with ``refined`` and its refinement."""
        minimum = check_sketch_memory(self._task, self._itemsize, self._settings.max_memory)

        def measure(lifts: Mapping[str, int]) -> _Estimate:
            clock = _Clock(self._device)
            with self._passes(self._task, lifts) as passes:
                setup, preparation = clock.seconds(), passes.preparation
                n_bytes, batch = passes.sketch_bytes(CHOICE.sketch_width), passes.batch_size
            seconds = setup + self._n_read * self._sketched(lifts)
            if refined:
                seconds += self._n_read * self._multiplied(lifts, SKETCHES.n_refined)
                n_bytes += self._task.n_parameters * SKETCHES.n_refined * self._itemsize
            grouping = Grouping(batch, batch, batch, minimum)
            return _Estimate(preparation, seconds, grouping, n_bytes)

        return lifting(measure)

    def matrix_free(self, rank: int | None) -> _Estimate:
        """Return the estimate for ``rank`` eigenpairs by the matrix-free engine (None: 100)."""
        n_columns = columns_of(self._task, rank)
        minimum = check_vectors_memory(self._task, n_columns, self._settings.max_memory)
        if by_directions(self._task, n_columns, self._dtype, self._settings.max_memory):
            return self._directions(n_columns, minimum)

        def measure(lifts: Mapping[str, int]) -> _Estimate:
            clock = _Clock(self._device)
            with self._passes(self._task, lifts) as passes:
                setup, preparation = clock.seconds(), passes.preparation
                width = sketch_width(self._n_rows, self._dtype, self._settings.max_memory)
                sketching, batch = passes.sketch_bytes(width), passes.batch_size
                making = passes.sketch_bytes(0)
            seconds = 2.0 * setup + self._n_read * (
                self._sketched(lifts) + _N_BLOCKS * self._multiplied(lifts, n_columns)
            )
            # These are the basis, its images and combinations; then products with the weights.
            vectors = (2 * _N_BLOCKS + 2) * self._n_rows * n_columns * 8
            held = self._task.n_parameters * n_columns * self._itemsize
            # The part of one layer is a tensor of its own before it is added.
            part = (
                max(p.n_weights for p in preparation.layout.parameters)
                * n_columns
                * self._itemsize
            )
            multiplying = making + vectors + min(held, self._settings.max_memory // 2) + part
            # The sketch is held about three times when its leading space is taken.
            n_bytes = max(3 * sketching - 2 * making, multiplying)
            grouping = Grouping(batch, batch, batch, minimum)
            return _Estimate(preparation, seconds, grouping, n_bytes)

        return lifting(measure)

    def _directions(self, n_columns: int, minimum: int) -> _Estimate:
        """Return the estimate for matrix-free products by direction, ``n_columns`` at a time."""
        task, device, dtype = self._task, self._device, self._dtype
        clock = _Clock(device)
        reference = task.initial_outputs(device, dtype)
        with task.frozen(device, dtype) as frozen:
            check_singles(task, frozen, reference, self._settings)
            setup = clock.seconds()
            directions = Directions(self._few, frozen, self._settings)
            vectors = torch.ones(
                (self._n_timed * task.n_outputs, _N_DIRECTIONS), dtype=dtype, device=device
            )
            seconds = _fastest(lambda: directions.images(vectors), device, 1)
        per_direction = self._n_read / self._n_timed * seconds / _N_DIRECTIONS
        # The start vectors are multiplied as well.
        total = setup + (_N_BLOCKS + 1) * n_columns * per_direction
        held = (2 * _N_BLOCKS + 2) * self._n_rows * n_columns * 8
        weights = task.n_parameters * directions.n_together * self._itemsize
        n_bytes = held + weights
        grouping = Grouping(1, 1, 1, minimum)
        tracing = probes_of(n_columns) * per_direction
        return _Estimate(None, total + tracing, grouping, n_bytes, tracing)

    def _passes(self, task: FineTuningTask, lifts: Mapping[str, int]) -> Passes:
        """Return passes over the data of a task with the settings of the planner."""
        return Passes(task, self._settings, lifts)

    def _sketched(self, lifts: Mapping[str, int]) -> float:
        """Return the seconds for projecting one sample, from a timed sketch of a few samples."""
        with self._passes(self._few, lifts) as passes:
            seconds = _fastest(
                lambda: passes.sketch(CHOICE.sketch_width),
                self._device,
                1,
            )
        return seconds / self._few_read

    def _multiplied(self, lifts: Mapping[str, int], n_columns: int) -> float:
        """Return the seconds per sample for a product of the kernel with ``n_columns`` vectors."""
        vectors = torch.ones(
            (self._n_timed * self._task.n_outputs, n_columns),
            dtype=self._dtype,
            device=self._device,
        )
        with self._passes(self._few, lifts) as passes:
            seconds = _fastest(lambda: passes.images(vectors), self._device, 1)
        return seconds / self._n_timed

    @property
    def _few_read(self) -> int:
        """The number of samples in a timed sketch: the timed ones and all validation samples."""
        return self._n_timed + self._n_read - self._task.n_samples


def _exact_seconds(
    task: FineTuningTask,
    preparation: Preparation,
    grouping: Grouping,
    per_sample: float,
    rate: float,
) -> float:
    """Return the seconds of the exact engine for ``per_sample`` seconds and ``rate`` flops/s."""
    n = task.n_samples
    n_held_out = 0 if task.validation is None else task.validation.n_samples
    starts = range(0, n, grouping.held)
    n_read = sum(n - start + n_held_out for start in starts)
    flops = 0.0
    for p in preparation.layout.parameters:
        cost = p.flops_per_pair * (LAYOUTS.ghost_overhead if p.method == "ghost" else 1.0)
        flops += cost * n * (LAYOUTS.triangle * n + n_held_out)
        if p.method == "panels":
            flops += p.flops_per_sample * n_read
    return n_read * per_sample + flops / rate


def _layers(task: FineTuningTask, preparation: Preparation) -> tuple[LayerPlan, ...]:
    """Return the plan of each parameter, in the order of the layout."""
    claims = {n: c for c in preparation.claims.claims for n, _ in c.parameters}
    return tuple(
        LayerPlan(
            name=p.name.removeprefix("model."),
            n_weights=p.n_weights,
            claimed_by=claims[p.name].module.removeprefix("model."),
            derivative=claims[p.name].kind,
            method=p.method,
            flops=task.n_samples
            * (p.flops_per_sample + LAYOUTS.triangle * task.n_samples * p.flops_per_pair),
            bytes=p.bytes_per_sample * task.n_samples,
        )
        for p in preparation.layout.parameters
    )


class _Clock:
    """A stopwatch that starts at its construction; on a CPU it excludes other programs' time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """Return the seconds since the start: on a CPU, the smaller of wall and processor time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter() - self._wall
        # With several threads the processor time exceeds the wall time.
        processor = time.process_time() - self._processor
        return min(time.perf_counter() - self._wall, processor)


def _fastest(function: Callable[[], object], device: torch.device, n_times: int) -> float:
    """Return the seconds of the fastest of ``n_times`` calls."""
    seconds = []
    for _ in range(n_times):
        clock = _Clock(device)
        function()
        seconds.append(clock.seconds())
    return min(seconds)


@cache
def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the flops per second of a matrix product, timed once per process."""
    matrix = torch.ones((_MATRIX, _MATRIX), dtype=dtype, device=device)
    return 2.0 * _MATRIX**3 / _fastest(lambda: matrix @ matrix, device, 3)
