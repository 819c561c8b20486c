"""Computation of the spectrum of a task: the public function :func:`compute_spectrum`."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from datetime import timezone
from functools import partial
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_seed
from optuna_ttp._util.exceptions import ApproximationWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.ntk._decomposition import columns_decomposition
from optuna_ttp.ntk._decomposition import exact_decomposition
from optuna_ttp.ntk._devices import resolve_device
from optuna_ttp.ntk._devices import resolve_dtype
from optuna_ttp.ntk._probe import probe_linearisation
from optuna_ttp.ntk._processes import by_first
from optuna_ttp.ntk._processes import check_same_task
from optuna_ttp.ntk._processes import in_all
from optuna_ttp.ntk._saturation import measure_saturation
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._checkpoint import check_checkpoint
from optuna_ttp.ntk.engines._checkpoint import KernelCheckpoint
from optuna_ttp.ntk.engines._choice import resolve_engine
from optuna_ttp.ntk.engines._eigenpairs import Decomposition
from optuna_ttp.ntk.engines._matrix_free import leading_pairs
from optuna_ttp.spectrum import check_truncation
from optuna_ttp.spectrum import measure_throughput
from optuna_ttp.spectrum import Probe
from optuna_ttp.spectrum import Saturation
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import SpectrumMetadata
from optuna_ttp.spectrum import Throughput
from optuna_ttp.spectrum import Validation
from optuna_ttp.task import check_task
from optuna_ttp.version import __version__


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


@without_autocast
def compute_spectrum(
    task: FineTuningTask,
    *,
    rank: int | None = None,
    explained_trace: float | None = None,
    engine: str = "auto",
    dtype: str = "float32",
    device: str | torch.device | None = None,
    max_memory: int = 4 * 2**30,
    measure_speed: bool = True,
    probe: bool = True,
    show_progress_bar: bool = True,
    seed: int = 0,
    checkpoint: KernelCheckpoint | None = None,
    distributed: bool = False,
) -> Spectrum:
    """Compute the Jacobian eigenspectrum of a task.

    Example:
        >>> task = FineTuningTask(model, (x, y))
        >>> spectrum = compute_spectrum(task, explained_trace=0.999)

    Args:
        task:
            The model with its data and loss.
        rank:
            The largest number of eigenpairs. By default all whose eigenvalue exceeds the rounding
            error; 100 with the engine ``"matrix_free"``.
        explained_trace:
            Keep the fewest eigenpairs whose eigenvalues sum to this share of the trace of the
            kernel, and four Ritz pairs that replace the dropped eigenpairs in the decay of the
            initial residual, see :meth:`Spectrum.truncate`. All eigenpairs by default.
        engine:
            ``"columns"``, a sample of the Jacobian's columns, as many as accurate predicted times
            need, all of them for a network of few weights; ``"exact"``, the whole kernel;
            ``"matrix_free"``, the leading ``rank`` eigenpairs from products with the kernel, in
            memory proportional to N C, and one or two dozen Ritz pairs that replace the other
            eigenpairs; or ``"auto"`` (the default), ``"columns"`` unless they do not fit
            ``max_memory`` or there are too many outputs, in which case it is ``"matrix_free"``,
            see :func:`~optuna_ttp.ntk.resolve_engine`. Predictions for Adam and AdamW need
            ``"columns"``; ``"matrix_free"`` does not support learning-rate multipliers but one.
        dtype:
            Precision of the Jacobian: ``"float32"`` (the default), ``"float64"``, or
            ``"bfloat16"``, for the exact engine: computed in single precision, stored in half the
            memory, and multiplied with sums in single precision. Eigenpairs are always computed
            in double precision.
        device:
            The device to compute on. By default a GPU if one is available, else the model's.
        max_memory:
            The memory budget for rows of the Jacobian and for the kernel matrix, in bytes. 4 GiB
            by default.
        measure_speed:
            True to time a few training steps, so that predictions can be given in seconds (the
            default). If False, ``throughput`` of the spectrum is :obj:`None`.
        probe:
            True to compare the network with its linearisation, by 10 to 15 backward passes over
            the data, and by forward passes over a few samples after large steps (the default). If
            False, ``probe`` and ``saturation`` of the spectrum are :obj:`None`, and predictions
            cannot say that they are unreliable.
        show_progress_bar:
            Show a progress bar if the standard error stream is a terminal. True by default.
        seed:
            The seed of the sample of columns, of the start vectors of ``"matrix_free"``, and of
            the samples and directions in which gradients are checked. Zero by default.
        checkpoint:
            An object that stores finished blocks of the kernel, so that an interrupted computation
            resumes from them. Only for the exact engine. None by default.
        distributed:
            Share the work with the other processes of the default group of
            :mod:`torch.distributed`, as under ``torchrun``; all must be given the same task, and
            get the same spectrum. Only for the engine ``"columns"``. False by default.

    Returns:
        The spectrum with its metadata. An :exc:`~optuna_ttp.ApproximationWarning` says if it is
        less accurate, or holds less of the trace, than asked for.

    Raises:
        TypeError:
            If the task is not a :class:`FineTuningTask`, or the memory budget not a number.
        ValueError:
            If a setting is out of its range or not supported by the engine, the memory does not
            suffice, or the task cannot be differentiated.
        JacobianMismatchError:
            If rows of the Jacobian differ from those of plain automatic differentiation.
    """

    def checked() -> tuple[str, EngineSettings]:
        check_task(task)
        check_truncation(rank, explained_trace)
        for name, switch in {"measure_speed": measure_speed, "probe": probe}.items():
            check_kind(name, switch, bool)
        chosen, _ = resolve_engine(task, engine, max_memory=max_memory)
        _check_engine_checkpoint(chosen, checkpoint)
        kind, held = resolve_dtype(dtype, chosen)
        settings = EngineSettings(
            seed=check_seed(seed),
            device=resolve_device(task, device),
            dtype=kind,
            held=held,
            max_memory=max_memory,
            show_progress_bar=show_progress_bar,
        )
        return chosen, settings

    chosen, settings = in_all(checked, distributed=distributed)
    if distributed:
        # This comes before any check that only some of the processes might fail.
        check_same_task(
            task,
            {
                "engine": engine,
                "dtype": dtype,
                "rank": rank,
                "explained_trace": explained_trace,
                "seed": settings.seed,
                "measure_speed": measure_speed,
                "probe": probe,
                "max_memory": max_memory,
            },
        )
    if chosen != "columns" and distributed:
        raise ValueError(f'distributed=True needs the engine "columns" but got {chosen!r}.')
    started = time.perf_counter()
    fingerprint = task.fingerprint
    initial_outputs = task.initial_outputs(settings.device, settings.dtype)
    if chosen == "exact":
        decomposition = exact_decomposition(task, settings, rank=rank, checkpoint=checkpoint)
    elif chosen == "columns":
        decomposition = columns_decomposition(
            task, settings, initial_outputs, rank=rank, distributed=distributed
        )
    else:
        decomposition = leading_pairs(task, settings, rank=rank)
    throughput = None
    if measure_speed:
        timed = partial(measure_throughput, task, device=settings.device)
        # The other processes wait meanwhile, so that they do not slow the timed steps down.
        throughput = by_first(timed) if distributed else timed()
    metadata = SpectrumMetadata(
        fingerprint=fingerprint,
        name=task.name,
        engine=chosen,
        dtype=dtype,
        device=str(settings.device),
        n_parameters=task.n_parameters,
        compute_seconds=time.perf_counter() - started,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        package_version=__version__,
        torch_version=torch.__version__,
        seed=None if chosen == "exact" else settings.seed,
        time_error=decomposition.time_error,
        trace_error=decomposition.trace_error,
        n_ritz=decomposition.n_ritz,
    )
    spectrum = _spectrum(task, settings, initial_outputs, decomposition, throughput, metadata)
    if explained_trace is not None:
        spectrum = spectrum.truncate(explained_trace=_within_reach(spectrum, explained_trace))
    if not probe:
        return spectrum

    def probed() -> tuple[Probe | None, Saturation]:
        compared = probe_linearisation(task, spectrum, **settings.place)
        steps = measure_saturation(task, spectrum, seed=settings.seed, **settings.place)
        return compared.probe, steps

    # All processes must get the same numbers.
    linearity, saturation = by_first(probed) if distributed else probed()
    seconds = time.perf_counter() - started
    metadata = replace(spectrum.metadata, compute_seconds=seconds)
    return replace(spectrum, probe=linearity, saturation=saturation, metadata=metadata)


def _check_engine_checkpoint(engine: str, checkpoint: KernelCheckpoint | None) -> None:
    """Raise TypeError if a checkpoint lacks methods, ValueError if the engine is not "exact"."""
    if checkpoint is not None and engine != "exact":
        raise ValueError(
            f'checkpoint must be None for the engine "{engine}" but got {checkpoint!r}: it '
            'keeps blocks of the kernel, which only engine="exact" makes.'
        )
    check_checkpoint(checkpoint)


def _spectrum(
    task: FineTuningTask,
    settings: EngineSettings,
    initial_outputs: NDArray[np.float64],
    decomposition: Decomposition,
    throughput: Throughput | None,
    metadata: SpectrumMetadata,
) -> Spectrum:
    """Build the spectrum from an engine's eigenpairs, with features of the validation samples."""
    validation = None
    if decomposition.validation_features is not None and task.validation is not None:
        validation = Validation(
            decomposition.validation_features,
            task.validation.initial_outputs(settings.device, settings.dtype),
            task.validation.targets,
        )
    pairs = decomposition.pairs
    precision = np.float64 if settings.dtype == torch.float64 else np.float32
    return Spectrum(
        eigenvalues=pairs.eigenvalues,
        eigenvectors=pairs.eigenvectors.astype(precision),
        trace=pairs.trace,
        initial_outputs=initial_outputs,
        targets=task.targets,
        loss=task.loss,
        throughput=throughput,
        metadata=metadata,
        weight_outputs=decomposition.weight_outputs,
        decay_factors=decomposition.decay_factors,
        validation=validation,
        jacobian=decomposition.jacobian,
        low_rank=decomposition.low_rank,
    )


def _within_reach(spectrum: Spectrum, explained_trace: float) -> float:
    """Return ``explained_trace``, or the share that the pairs hold, with a warning, if smaller."""
    share = spectrum.explained_trace
    if spectrum.metadata.engine == "matrix_free" and share < explained_trace:
        warn_caller(
            f"The leading {spectrum.rank} eigenpairs hold {share:.3g} of the trace, not "
            f"explained_trace={explained_trace}. Give a larger rank.",
            ApproximationWarning,
        )
    return min(share, explained_trace)
