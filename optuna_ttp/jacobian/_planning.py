"""Planning a spectrum: a few samples are differentiated, the rest is counted."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import time
from typing import TYPE_CHECKING

import torch

from optuna_ttp.jacobian._choice import resolve_engine
from optuna_ttp.jacobian._devices import DTYPES
from optuna_ttp.jacobian._devices import resolve_device
from optuna_ttp.jacobian._exact import block_sizes
from optuna_ttp.jacobian._exact import BlockSizes
from optuna_ttp.jacobian._layout import GHOST_OVERHEAD
from optuna_ttp.jacobian._layout import TRIANGLE
from optuna_ttp.jacobian._plan import LayerPlan
from optuna_ttp.jacobian._plan import SpectrumPlan
from optuna_ttp.jacobian._prepare import lifting
from optuna_ttp.jacobian._prepare import Preparation
from optuna_ttp.jacobian._prepare import prepare
from optuna_ttp.jacobian._samples import check_singles
from optuna_ttp.jacobian._samples import SampleReader


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# Samples that are timed.
_N_TIMED = 4
_MATRIX = 1024


def plan_spectrum(
    task: FineTuningTask,
    *,
    engine: str = "auto",
    dtype: str = "float32",
    device: str | torch.device | None = None,
    max_memory: int = 4 * 2**30,
    seed: int = 0,
) -> SpectrumPlan:
    """Say how a spectrum would be computed, and what that takes, without computing it.

    A few samples are differentiated and timed, and a matrix product; the rest is counted. The
    eigenvectors, the timing of training steps and the probe come on top.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> task = FineTuningTask(model, (torch.randn(8, 3), torch.randint(2, (8,))))
        >>> plan = plan_spectrum(task)
        >>> plan.engine
        'exact'

    Args:
        task:
            What is fine-tuned.
        engine:
            As for :func:`~optuna_ttp.compute_spectrum`. ``"auto"`` by default.
        dtype:
            ``"float32"`` (the default) or ``"float64"``.
        device:
            As for :func:`~optuna_ttp.compute_spectrum`.
        max_memory:
            Bytes. 4 GiB by default.
        seed:
            Of the random directions in which gradients are compared. Zero by default.

    Returns:
        The plan; print it.

    Raises:
        ValueError:
            As for :func:`~optuna_ttp.compute_spectrum`.
    """
    name, reason = resolve_engine(task, engine, max_memory=max_memory)
    if name != "exact":
        raise ValueError(
            f'plan_spectrum can only plan the engine "exact" so far but got {name!r} ({reason}).'
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)} but got {dtype!r}.")
    where, kind = resolve_device(task, device), DTYPES[dtype]
    reference = task.initial_outputs(where, kind)

    def measure(lifts: Mapping[str, int]) -> tuple[Preparation, BlockSizes, float]:
        with task.frozen(where, kind) as frozen:
            check_singles(task, frozen, reference, where, kind)
            found = prepare(task, frozen, device=where, dtype=kind, seed=seed, lifts=lifts)
            sizes = block_sizes(task, found, kind, where, max_memory)
            n_timed = min(_N_TIMED, task.n_samples)
            with found.claims.tape(frozen).attached() as tape:
                reader = SampleReader(
                    task,
                    frozen,
                    found.claims,
                    tape,
                    batch_size=n_timed,
                    device=where,
                    dtype=kind,
                    reference=reference,
                )
                seconds = min(
                    _timed(lambda: reader.read(found.layout, 0, n_timed), where) for _ in range(2)
                )
        return found, sizes, seconds / n_timed

    preparation, sizes, per_sample = lifting(measure)
    rate = _flops_per_second(where, kind)
    return SpectrumPlan(
        engine=name,
        reason=reason,
        n_samples=task.n_samples,
        n_outputs=task.n_outputs,
        n_parameters=task.n_parameters,
        seconds=_seconds(task, preparation, sizes, per_sample, rate),
        bytes=sizes.n_bytes,
        batch_size=sizes.batch,
        block_size=sizes.held,
        stream_size=sizes.streamed,
        minimum_bytes=sizes.minimum,
        layers=_layers(task, preparation),
    )


def _seconds(
    task: FineTuningTask,
    preparation: Preparation,
    sizes: BlockSizes,
    per_sample: float,
    rate: float,
) -> float:
    n = task.n_samples
    n_held_out = 0 if task.validation is None else task.validation.n_samples
    starts = range(0, n, sizes.held)
    n_read = sum(n - start + n_held_out for start in starts)
    flops = 0.0
    for p in preparation.layout.parameters:
        cost = p.flops_per_pair * (GHOST_OVERHEAD if p.method == "ghost" else 1.0)
        flops += cost * n * (TRIANGLE * n + n_held_out)
        if p.method == "panels":
            flops += p.flops_per_sample * n_read
    return n_read * per_sample + flops / rate


def _layers(task: FineTuningTask, preparation: Preparation) -> tuple[LayerPlan, ...]:
    claims = {n: c for c in preparation.claims.claims for n, _ in c.parameters}
    return tuple(
        LayerPlan(
            name=p.name.removeprefix("model."),
            n_weights=p.size,
            claimed_by=claims[p.name].module.removeprefix("model."),
            derivative=claims[p.name].kind,
            method=p.method,
            flops=task.n_samples
            * (p.flops_per_sample + TRIANGLE * task.n_samples * p.flops_per_pair),
            bytes=p.bytes_per_sample * task.n_samples,
        )
        for p in preparation.layout.parameters
    )


def _timed(function: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones((_MATRIX, _MATRIX), dtype=dtype, device=device)
    seconds = min(_timed(lambda: matrix @ matrix, device) for _ in range(3))
    return 2.0 * _MATRIX**3 / seconds
