"""The eigenpairs that a truncated spectrum keeps, and the Ritz pairs in place of the others."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.spectrum._ritz import ritz_pairs
from optuna_ttp.spectrum._validation import Validation


def check_truncation(rank: int | None, explained_trace: float | None) -> None:
    """Raise ValueError unless the rank is at least 1 and the share of the trace in (0, 1]."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank must be a positive integer but got {rank!r}.")
    is_number = isinstance(explained_trace, Real) and not isinstance(explained_trace, bool)
    if explained_trace is not None and not (is_number and 0.0 < explained_trace <= 1.0):
        raise ValueError(f"explained_trace must be in (0, 1] but got {explained_trace!r}.")


def n_explaining(eigenvalues: NDArray[np.float64], amount: float) -> int:
    """Return how many of r leading eigenvalues sum to ``amount`` or more; r if all sum to less."""
    cumulated = np.cumsum(eigenvalues)
    return min(int(np.searchsorted(cumulated, amount * (1 - 1e-12))) + 1, len(eigenvalues))


def leading(
    rank: int,
    eigenvalues: NDArray[np.float64],
    eigenvectors: NDArray[np.floating[Any]],
    validation: Validation | None,
    decay_factors: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Return the arrays of the first ``rank`` eigenpairs, by their names in a spectrum."""
    if validation is not None:
        validation = replace(validation, features=validation.features[:, :rank])
    return {
        "eigenvalues": eigenvalues[:rank],
        "eigenvectors": eigenvectors[:, :rank],
        "validation": validation,
        "decay_factors": None if decay_factors is None else decay_factors[:rank],
    }


def condensed(
    rank: int,
    n_ritz: int,
    residual: NDArray[np.float64],
    eigenvalues: NDArray[np.float64],
    eigenvectors: NDArray[np.floating[Any]],
    validation: Validation | None,
    decay_factors: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Return the arrays of the first ``rank`` eigenpairs and of Ritz pairs for the others.

    ``residual`` is the loss gradient in the outputs, of shape ``(N C,)``. The arrays are returned
    by their names in a spectrum; there are at most ``n_ritz`` Ritz pairs.
    """
    rest = eigenvalues[rank:]
    values, mixing = ritz_pairs(rest, residual @ eigenvectors[:, rank:], n_ritz)
    all_values = np.concatenate([eigenvalues[:rank], values])

    def mixed(columns: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        new = np.concatenate([columns[:, :rank], columns[:, rank:] @ mixing], axis=1)
        return new.astype(columns.dtype)

    if validation is not None:
        # The features are the cross kernel over the root of the eigenvalue.
        cross = mixed(validation.features * np.sqrt(eigenvalues))
        features = cross / np.sqrt(all_values).astype(cross.dtype)
        validation = replace(validation, features=features)
    if decay_factors is not None:
        # Only each direction's factor is known, not those of mixtures, so they are averaged.
        shares = np.square(mixing) * rest[:, None] / values
        decay_factors = np.concatenate([decay_factors[:rank], decay_factors[rank:] @ shares])
    return {
        "eigenvalues": all_values,
        "eigenvectors": mixed(eigenvectors),
        "validation": validation,
        "decay_factors": decay_factors,
    }
