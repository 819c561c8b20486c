"""Decompositions of the exact kernel and of a sample of columns into leading eigenpairs."""

from __future__ import annotations

from functools import partial
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp._util.exceptions import ApproximationWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.dynamics import PathFollower
from optuna_ttp.ntk._processes import by_first
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._checkpoint import KernelCheckpoint
from optuna_ttp.ntk.engines._choice import first_columns
from optuna_ttp.ntk.engines._choice import most_columns
from optuna_ttp.ntk.engines._columns import pick_columns
from optuna_ttp.ntk.engines._eigenpairs import Decomposition
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs_of_features
from optuna_ttp.ntk.engines._exact import exact_kernel
from optuna_ttp.ntk.engines._picked_columns import PickedColumns
from optuna_ttp.ntk.engines._rules import COLUMNS
from optuna_ttp.ntk.engines._time_error import TimeError


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


def exact_decomposition(
    task: FineTuningTask,
    settings: EngineSettings,
    *,
    rank: int | None,
    checkpoint: KernelCheckpoint | None,
) -> Decomposition:
    """Compute the exact kernel and its leading ``rank`` eigenpairs (by default all)."""
    kernel = exact_kernel(task, checkpoint=checkpoint, **vars(settings))
    pairs = eigenpairs(kernel.gram, rank=rank)
    decay_factors = None
    if kernel.stretched is not None:
        moved = kernel.stretched @ pairs.eigenvectors
        decay_factors = np.asarray((pairs.eigenvectors * moved).sum(axis=0) / pairs.eigenvalues)
    features = None
    if kernel.cross is not None:
        whitened = pairs.eigenvectors / np.sqrt(pairs.eigenvalues)
        features = (kernel.cross @ whitened).astype(kernel.cross.dtype)
    return Decomposition(pairs, kernel.weight_outputs, features, decay_factors)


def columns_decomposition(
    task: FineTuningTask,
    settings: EngineSettings,
    initial_outputs: NDArray[np.float64],
    *,
    rank: int | None,
    distributed: bool = False,
) -> Decomposition:
    """Decompose the products of a sample of columns that is large enough for accurate times.

    The number of columns is doubled until the standard error and the bias of the times of gradient
    flow to 50, 25 and 10 % of the initial loss are at most 8 %. If the memory does not allow that,
    an :exc:`~optuna_ttp.ApproximationWarning` is given. The decomposition holds a smaller sample
    of these columns, for optimisers that act on single weights. With ``distributed`` all processes
    of the default group share the samples.
    """
    most = most_columns(task, settings.dtype.itemsize, settings.max_memory)
    n_columns = min(most, first_columns(task))
    follower = PathFollower(task, initial_outputs)
    while True:
        picked = pick_columns(
            task, settings, initial_outputs, n_columns=n_columns, distributed=distributed
        )
        factors = torch.as_tensor(list(task.multipliers.values()), dtype=torch.float64)
        multipliers = factors.to(picked.parameters.device)[picked.parameters]
        roots = (picked.inflation * multipliers).sqrt()
        features = picked.columns * roots.to(picked.columns)
        judged = partial(_judged, picked, features, follower)
        pairs, error = by_first(judged) if distributed else judged()
        if error.expected <= COLUMNS.time_error or n_columns >= most:
            break
        n_columns = min(2 * n_columns, most)
    if not error.expected <= COLUMNS.time_error:
        by_what = f"uncertain by {error.bar:.0%}" if np.isfinite(error.bar) else "unknown"
        warn_caller(
            f"The sample of {features.shape[1]} columns leaves predicted times {by_what}. "
            'Give more memory, or use engine="exact".',
            ApproximationWarning,
        )
    if rank is not None:
        pairs = Eigenpairs(pairs.eigenvalues[:rank], pairs.eigenvectors[:, :rank], pairs.trace)
    decay_factors = None
    if bool((factors != 1.0).any()):
        basis = torch.as_tensor(pairs.eigenvectors).to(features)
        moved = (basis.T @ features).square() @ multipliers.to(features)
        decay_factors = np.asarray(moved.double().cpu().numpy()) / pairs.eigenvalues
    others = None if picked.validation is None else picked.validation * roots.to(features)
    return Decomposition(
        pairs,
        picked.weight_outputs,
        _validation_features(features, others, pairs),
        decay_factors,
        time_error=error.bar,
        jacobian=picked.thinned(COLUMNS.n_stored, task, settings.seed),
        low_rank=picked.low_rank,
    )


def _judged(
    picked: PickedColumns, features: torch.Tensor, follower: PathFollower
) -> tuple[Eigenpairs, TimeError]:
    """Return the eigenpairs of the products of features, and the error of their times."""
    pairs = eigenpairs_of_features(features)
    return pairs, picked.error(follower, features, pairs)


def _validation_features(
    features: torch.Tensor, others: torch.Tensor | None, pairs: Eigenpairs
) -> NDArray[np.floating[Any]] | None:
    """Return ``J_v J^T V Lambda^(-1/2)``, ``(N_v C, r)``, or None without validation samples."""
    if others is None:
        return None
    whitened = torch.as_tensor(pairs.eigenvectors / np.sqrt(pairs.eigenvalues)).to(others)
    return np.asarray((others @ (features.T @ whitened)).cpu().numpy())
