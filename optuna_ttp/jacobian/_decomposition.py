"""What every engine gives: the leading eigenpairs, and what else the dynamics need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.exceptions import ApproximationWarning
from optuna_ttp.jacobian._checkpoint import KernelCheckpoint
from optuna_ttp.jacobian._choice import check_sketch_memory
from optuna_ttp.jacobian._choice import widest_sketch
from optuna_ttp.jacobian._choice import WIDTH
from optuna_ttp.jacobian._eigenpairs import Eigenpairs
from optuna_ttp.jacobian._eigenpairs import eigenpairs
from optuna_ttp.jacobian._eigenpairs import eigenpairs_of_features
from optuna_ttp.jacobian._exact import exact_kernel
from optuna_ttp.jacobian._flow import follow_flow
from optuna_ttp.jacobian._flow import FRACTIONS
from optuna_ttp.jacobian._matrix_free import leading_pairs
from optuna_ttp.jacobian._sketch import refine
from optuna_ttp.jacobian._sketch import Sketch
from optuna_ttp.jacobian._sketch import sketch_jacobian
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import SpectrumMetadata


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# By how much the predicted times may be off because of the projection.
_TIME_ERROR = 0.03
# Directions that gradient flow is followed in to judge a sketch: as many as take a second or so.
_MIN_FLOW_RANK, _FLOW_ENTRIES = 200, 4 * 10**6
# Leading eigenpairs that are refined, and how many more for the sake of the last of these.
_N_REFINED = 100
_N_MORE = 50


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The leading eigenpairs of the kernel with what else is made of the Jacobian.

    Attributes:
        pairs:
            The eigenpairs that are kept.
        weight_outputs:
            ``J diag(c) w_0``, of shape ``(N, C)``.
        decay_factors:
            As in :class:`~optuna_ttp.Spectrum`.
        validation_features:
            As in :class:`~optuna_ttp.spectrum.Validation`.
        sketch_width:
            As in :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
        time_error:
            As in :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
        n_ritz:
            As in :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
    """

    pairs: Eigenpairs
    weight_outputs: NDArray[np.float64]
    decay_factors: NDArray[np.float64] | None
    validation_features: NDArray[np.floating[Any]] | None
    sketch_width: int | None = None
    time_error: float | None = None
    n_ritz: int = 0


def exact_decomposition(
    task: FineTuningTask,
    *,
    rank: int | None,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: int,
    show_progress_bar: bool,
    seed: int,
    checkpoint: KernelCheckpoint | None,
    distributed: bool,
    held: torch.dtype | None,
) -> Decomposition:
    """Decompose the exact kernel.

    Args:
        task:
            What is fine-tuned.
        rank:
            As for :func:`~optuna_ttp.compute_spectrum`.
        device:
            Where.
        dtype:
            Precision of the Jacobian.
        max_memory:
            Bytes.
        show_progress_bar:
            Whether to show one.
        seed:
            Of what is checked.
        checkpoint:
            For finished blocks, or :obj:`None`.
        distributed:
            Share the samples with other processes.
        held:
            As for :func:`~optuna_ttp.jacobian.exact_kernel`.

    Returns:
        The decomposition.
    """
    kernel = exact_kernel(
        task,
        device=device,
        dtype=dtype,
        max_memory=max_memory,
        show_progress_bar=show_progress_bar,
        seed=seed,
        checkpoint=checkpoint,
        distributed=distributed,
        held=held,
    )
    pairs = eigenpairs(kernel.gram, rank=rank)
    decay_factors = None
    if kernel.stretched is not None:
        moved = kernel.stretched @ pairs.eigenvectors
        decay_factors = np.asarray((pairs.eigenvectors * moved).sum(axis=0) / pairs.eigenvalues)
    features = None
    if kernel.cross is not None:
        whitened = pairs.eigenvectors / np.sqrt(pairs.eigenvalues)
        features = (kernel.cross @ whitened).astype(kernel.cross.dtype)
    return Decomposition(pairs, kernel.weight_outputs, decay_factors, features)


def sketched_decomposition(
    task: FineTuningTask,
    initial_outputs: NDArray[np.float64],
    *,
    refined: bool,
    rank: int | None,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: int,
    show_progress_bar: bool,
    seed: int,
) -> Decomposition:
    """Decompose a sketch that is wide enough for the predicted times.

    The width is doubled until the times of gradient flow to 50, 25 and 10 % of the initial loss
    that its two halves predict differ by at most twice 3 % from each other, and on average by 3 %
    from those of the whole, or the memory does not allow more; then there is an
    :exc:`~optuna_ttp.exceptions.ApproximationWarning`.

    ``initial_outputs`` are those of the pretrained model, ``(N, C)``; with ``refined`` the leading
    eigenpairs are refined by two more passes. The other arguments are those of
    :func:`exact_decomposition`.

    Returns:
        The decomposition.
    """
    width = WIDTH
    check_sketch_memory(task, torch.empty((), dtype=dtype).element_size(), max_memory)
    widest = widest_sketch(task, str(dtype).removeprefix("torch."), max_memory=max_memory)
    while True:
        sketch = sketch_jacobian(
            task,
            width=width,
            device=device,
            dtype=dtype,
            seed=seed,
            show_progress_bar=show_progress_bar,
        )
        error = _time_error(task, initial_outputs, sketch)
        if error <= _TIME_ERROR or width >= widest:
            break
        width *= 2
    if not error <= _TIME_ERROR:
        by_what = f"uncertain by {error:.0%}" if np.isfinite(error) else "unknown"
        warnings.warn(
            f"The sketch of width {width} leaves predicted times {by_what}. "
            'Give more memory, or use engine="exact".',
            ApproximationWarning,
            stacklevel=4,
        )
    features, others = sketch.features(), sketch.validation_features()
    n_needed = _N_REFINED + _N_MORE if refined else rank
    pairs = eigenpairs_of_features(features, rank=n_needed, trace=sketch.trace)
    if refined:
        features, others = refine(
            task,
            features,
            pairs,
            others=others,
            n_refined=_N_REFINED + _N_MORE,
            device=device,
            dtype=dtype,
            seed=seed,
            max_memory=max_memory,
            show_progress_bar=show_progress_bar,
        )
        pairs = eigenpairs_of_features(features, rank=rank, trace=sketch.trace)
    return Decomposition(
        pairs,
        sketch.weight_outputs,
        None,
        _validation_features(features, others, pairs),
        width,
        error,
    )


def matrix_free_decomposition(
    task: FineTuningTask,
    *,
    rank: int | None,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: int,
    show_progress_bar: bool,
    seed: int,
) -> Decomposition:
    """Decompose the kernel by products with it.

    The arguments are those of :func:`exact_decomposition`.

    Returns:
        The decomposition.
    """
    found = leading_pairs(
        task,
        rank=rank,
        device=device,
        dtype=dtype,
        max_memory=max_memory,
        show_progress_bar=show_progress_bar,
        seed=seed,
    )
    return Decomposition(
        found.pairs,
        found.weight_outputs,
        None,
        found.validation_features,
        time_error=found.time_error,
        n_ritz=found.n_ritz,
    )


def _validation_features(
    features: torch.Tensor, others: torch.Tensor | None, pairs: Eigenpairs
) -> NDArray[np.floating[Any]] | None:
    if others is None:
        return None
    whitened = torch.as_tensor(pairs.eigenvectors / np.sqrt(pairs.eigenvalues)).to(others)
    return np.asarray((others @ (features.T @ whitened)).cpu().numpy())


def _time_error(
    task: FineTuningTask, initial_outputs: NDArray[np.float64], sketch: Sketch
) -> float:
    """How far the times that a sketch predicts may be off, relatively.

    Half of the difference of its halves is what chance does. What the projection does on average
    falls with the width, so that the halves have twice as much of it as the whole. Where flow does
    not get to 50 % of the loss in thousands of steps, the times are those to 50, 75 and 90 % of
    how far it gets.
    """
    if sketch.is_exact:
        return 0.0
    # Where a spectrum hardly decays, its leading directions alone never reach the targets.
    rank = max(_MIN_FLOW_RANK, _FLOW_ENTRIES // (task.n_samples * task.n_outputs))
    half, other_half, together = (
        _plain_spectrum(task, initial_outputs, sketch, half) for half in (0, 1, None)
    )
    fractions: tuple[float, ...] = FRACTIONS
    flow = follow_flow(together, rank=rank)
    if flow.left > fractions[0]:
        # None of them is reached: the same shares of what is.
        fractions = tuple(1.0 - (1.0 - fraction) * (1.0 - flow.left) for fraction in fractions)
        flow = follow_flow(together, rank=rank, fractions=fractions)
    whole = flow.times
    one, other = (follow_flow(s, rank=rank, fractions=fractions).times for s in (half, other_half))
    reached = np.isfinite(one) & np.isfinite(other) & np.isfinite(whole)
    if not reached.any():
        return float("inf")
    one, other, whole = one[reached], other[reached], whole[reached]
    chance = np.abs(one - other) / (one + other)
    on_average = np.abs((one + other) / 2.0 - whole) / whole
    return float(np.maximum(chance, on_average).max())


def _plain_spectrum(
    task: FineTuningTask,
    initial_outputs: NDArray[np.float64],
    sketch: Sketch,
    half: int | None,
) -> Spectrum:
    pairs = eigenpairs_of_features(sketch.features(half), trace=sketch.trace)
    return Spectrum(
        pairs.eigenvalues,
        pairs.eigenvectors,
        pairs.trace,
        initial_outputs,
        task.targets,
        task.loss,
        None,
        SpectrumMetadata("", "", "sketch", "", "", task.n_parameters, 0.0, "", "", ""),
    )
