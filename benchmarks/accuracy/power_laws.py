"""Eigenvalues and projections of all samples from those of a subset, by the paper's power laws."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def power_law_modes(
    eigenvalues: NDArray[np.float64],
    projections: NDArray[np.float64],
    squared_norm: float,
    n_samples: int,
    total: int,
    *,
    alpha: float = 0.15,
    n_measured: int = 100,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Carry eigenvalues and projections from a subset to all samples by the paper's power laws.

    Zancato et al., NeurIPS 2020, appendix D, for the mean squared error. The eigenvalues, divided
    by the number of samples, follow ``c k^(-s)``, fitted on the subset, and
    ``c k^(-s + alpha (N_0 / N - 1))`` on all samples. The projections, a share of ``|dy|^2`` each,
    are kept for ``k < k_0`` and follow ``a k^(-b)`` beyond, continuous at ``k_0`` and with the
    right sum.

    Args:
        eigenvalues:
            Of the subset's kernel, descending, shape ``(r,)``.
        projections:
            ``(dy . v_k)^2``, shape ``(r,)``.
        squared_norm:
            ``|dy|^2`` of the subset.
        n_samples:
            ``N_0``.
        total:
            ``N``.
        alpha:
            The paper found 0.1 to 0.2. 0.15 by default.
        n_measured:
            ``k_0``. 100 by default.

    Returns:
        Eigenvalues and projections of all samples, of shape ``(r N / N_0,)``.
    """
    rank = len(eigenvalues)
    k = np.arange(1, rank + 1, dtype=np.float64)
    middle = slice(min(5, rank // 4), max(2, 3 * rank // 4))
    slope, offset = np.polyfit(np.log(k[middle]), np.log(eigenvalues[middle] / n_samples), 1)
    length = int(rank * total / n_samples)
    more = np.arange(1, length + 1, dtype=np.float64)
    law = np.exp(offset) * more ** (slope + alpha * (n_samples / total - 1.0))
    values = np.maximum.accumulate((total * law)[::-1])[::-1]
    n_measured = min(n_measured, rank)
    shares = projections[:n_measured] / squared_norm
    rest = max(0.0, 1.0 - float(shares.sum()))
    tail = more[n_measured:]
    if len(tail) == 0 or rest < 1e-12:
        both = np.concatenate([shares, np.zeros(len(tail))])
        return values, both * squared_norm * total / n_samples
    start = float(np.exp(np.log(np.maximum(shares[-20:], 1e-300)).mean()))
    exponent = _tail_exponent(start, n_measured, tail, rest)
    continued = start * (tail / n_measured) ** (-exponent)
    continued *= rest / continued.sum()
    both = np.concatenate([shares, continued]) * squared_norm * total / n_samples
    return values, both


def _tail_exponent(start: float, n_measured: int, tail: NDArray[np.float64], rest: float) -> float:
    """The ``b`` with ``sum_k start (k / k_0)^(-b) = rest``."""
    from scipy.optimize import brentq

    def excess(exponent: float) -> float:
        return float(start * ((tail / n_measured) ** (-exponent)).sum() - rest)

    low, high = 0.0, 20.0
    if excess(low) <= 0.0:
        return low
    return float(brentq(excess, low, high)) if excess(high) < 0.0 else high
