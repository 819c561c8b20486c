"""Planning a spectrum: which engine, how many passes over the data, and how much memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.checks import check_seed
from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.ntk._devices import resolve_device
from optuna_ttp.ntk._devices import resolve_dtype
from optuna_ttp.ntk._plan import LayerPlan
from optuna_ttp.ntk._plan import SpectrumPlan
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._choice import first_columns
from optuna_ttp.ntk.engines._choice import least_bytes
from optuna_ttp.ntk.engines._choice import most_columns
from optuna_ttp.ntk.engines._choice import resolve_engine
from optuna_ttp.ntk.engines._exact import choose_grouping
from optuna_ttp.ntk.engines._exact import expected_bytes
from optuna_ttp.ntk.engines._matrix_free import by_directions
from optuna_ttp.ntk.engines._matrix_free import check_vectors_memory
from optuna_ttp.ntk.engines._matrix_free import columns_of
from optuna_ttp.ntk.engines._matrix_free import n_start_columns
from optuna_ttp.ntk.engines._matrix_free import probes_of
from optuna_ttp.ntk.engines._rules import COLUMNS
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.spectrum import check_truncation
from optuna_ttp.task import check_task


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# This number of samples is differentiated.
_N_READ = 12
# This is the usual number of blocks of products of the matrix-free engine.
_N_BLOCKS = 2


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
    """Say how a spectrum would be computed, in how many passes and what memory.

    Only the gradients of a few samples are computed, to find out how each layer is differentiated.
    For columns the plan is for the first sample, which is repeated with twice as many columns
    while its error bar is too large; for the matrix-free engine it is for two blocks of products,
    which most spectra take.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> task = FineTuningTask(model, (torch.randn(8, 3), torch.randint(2, (8,))))
        >>> plan = plan_spectrum(task)
        >>> plan.engine
        'columns'

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
        The plan: engine, passes, bytes, and one entry per parameter; printing it shows a table.

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
    # What can be refused without a pass is refused first.
    n_columns = _n_columns(task, name, settings)
    if name == "matrix_free":
        check_vectors_memory(task, columns_of(task, rank), max_memory)
    preparation = lifting(partial(_prepared, task, settings))
    if name == "columns":
        n_passes, n_bytes, minimum = _of_columns(task, settings)
    elif name == "exact":
        n_passes, n_bytes, minimum = _of_exact(task, settings, preparation)
    else:
        n_passes, n_bytes, minimum = _of_products(task, settings, rank)
    if n_bytes > max_memory:
        reason += f"; the peak is above max_memory of {max_memory / 2**20:,.3g} MiB"
    return SpectrumPlan(
        engine=name,
        reason=reason,
        n_samples=task.n_samples,
        n_outputs=task.n_outputs,
        n_parameters=task.n_parameters,
        n_columns=n_columns,
        n_passes=n_passes,
        bytes=n_bytes,
        stored_bytes=_stored_bytes(task, name, rank, settings),
        minimum_bytes=minimum,
        layers=_layers(preparation, name),
    )


def _prepared(
    task: FineTuningTask, settings: EngineSettings, lifts: Mapping[str, int]
) -> Preparation:
    """Return how each parameter is differentiated, from the gradients of a few samples."""
    reference = task.initial_outputs(settings.device, settings.dtype)
    with task.frozen(settings.device, settings.dtype) as frozen:
        check_singles(task, frozen, reference, settings)
        preparation = prepare(task, frozen, settings, lifts)
        n_few = min(_N_READ, task.n_samples)
        with preparation.claims.tape(frozen).attached() as tape:
            reader = SampleReader(
                task,
                frozen,
                preparation.claims,
                tape,
                settings,
                batch_size=n_few,
                reference=reference,
            )
            # Layers that only some samples reach show in a larger batch.
            reader.read(preparation.layout, 0, n_few, weight_outputs=False)
        return preparation


def _n_columns(task: FineTuningTask, engine: str, settings: EngineSettings) -> int:
    """Return the number of columns of the first sample, zero for other engines."""
    if engine != "columns":
        return 0
    most = most_columns(task, settings.dtype.itemsize, settings.max_memory)
    return min(most, first_columns(task))


def _of_columns(task: FineTuningTask, settings: EngineSettings) -> tuple[float, int, int]:
    """Return passes, bytes and the smallest budget for a sample of columns."""
    n_columns = _n_columns(task, "columns", settings)
    n_rows, itemsize = task.n_samples * task.n_outputs, settings.dtype.itemsize
    return (
        _column_passes(task),
        3 * n_columns * n_rows * itemsize,
        least_bytes(task, itemsize),
    )


def _column_passes(task: FineTuningTask) -> float:
    """Return the passes of a sample: rows of a few samples, then all, and outputs twice."""
    few = 2.0 * min(COLUMNS.n_rows, task.n_samples) / task.n_samples
    return 2.0 + few + (1 + task.n_outputs) * _share_read(task)


def _of_exact(
    task: FineTuningTask, settings: EngineSettings, preparation: Preparation
) -> tuple[float, int, int]:
    """Return passes, bytes and the smallest budget for the exact kernel."""
    grouping = choose_grouping(task, preparation, settings)
    n, held_out = task.n_samples, _share_read(task) - 1.0
    starts = range(0, n, grouping.held)
    n_read = sum(1.0 - start / n + held_out for start in starts)
    n_bytes = expected_bytes(task, preparation, grouping, settings.dtype)
    return 1.0 + (1 + task.n_outputs) * n_read, n_bytes, grouping.minimum


def _of_products(
    task: FineTuningTask, settings: EngineSettings, rank: int | None
) -> tuple[float, int, int]:
    """Return passes, bytes and the smallest budget for matrix-free products."""
    n_columns, itemsize = columns_of(task, rank), settings.dtype.itemsize
    n_rows = task.n_samples * task.n_outputs
    minimum = check_vectors_memory(task, n_columns, settings.max_memory)
    # These are the basis, its images and combinations.
    vectors = (2 * _N_BLOCKS + 2) * n_rows * n_columns * 8
    weights = min(task.n_parameters * n_columns * itemsize, settings.max_memory // 2)
    if by_directions(task, n_columns, settings.dtype, settings.max_memory):
        n_directions = (_N_BLOCKS + 1) * n_columns + probes_of(n_columns)
        return 1.0 + 4.0 * n_directions, vectors + weights, minimum
    start = 3 * n_start_columns(task, settings.dtype, settings.max_memory) * n_rows * itemsize
    n_passes = _column_passes(task) + 2.0 * _N_BLOCKS * (1 + task.n_outputs) * _share_read(task)
    return n_passes, max(start, vectors + weights), minimum


def _share_read(task: FineTuningTask) -> float:
    """Return the training and validation samples, as a share of the training samples."""
    n_held_out = 0 if task.validation is None else task.validation.n_samples
    return 1.0 + n_held_out / task.n_samples


def _stored_bytes(
    task: FineTuningTask, engine: str, rank: int | None, settings: EngineSettings
) -> int:
    """Return the bytes of eigenvectors and, with the columns engine, of the columns kept."""
    n_rows = task.n_samples * task.n_outputs
    n_read = round(n_rows * _share_read(task))
    n_pairs = columns_of(task, rank) if engine == "matrix_free" else min(n_rows, rank or n_rows)
    total = n_read * min(n_pairs, task.n_parameters) * settings.dtype.itemsize
    if engine == "columns":
        itemsize = 8 if settings.dtype == torch.float64 else 2
        total += n_read * min(COLUMNS.n_stored, task.n_parameters) * itemsize
    return total


def _layers(preparation: Preparation, engine: str) -> tuple[LayerPlan, ...]:
    """Return the plan of each parameter, in the order of the layout."""
    claims = {n: c for c in preparation.claims.claims for n, _ in c.parameters}
    return tuple(
        LayerPlan(
            name=p.name.removeprefix("model."),
            n_weights=p.n_weights,
            claimed_by=claims[p.name].module.removeprefix("model."),
            derivative=claims[p.name].kind,
            method="columns" if engine == "columns" else p.method,
        )
        for p in preparation.layout.parameters
    )
