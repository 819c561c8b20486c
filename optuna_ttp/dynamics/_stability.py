"""The largest stable learning rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def max_learning_rate(
    curvatures: NDArray[np.float64],
    n_samples: int,
    batch_size: NDArray[np.int64],
    momentum: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the learning rate at which heavy-ball SGD stops being mean-square stable.

    The smallest ``eta`` with ``eta h_1 = 2 (1 + m)`` or ``S(eta) = 1``, where
    ``S = gamma sum_k eta h_k (1 + m) / ((1 - m) (2 (1 + m) - eta h_k))`` and
    ``gamma = (N - B) / ((N - 1) B)``: the generating-function criterion of Velikanov,
    Kuznedelev and Yarotsky, 2022 (arXiv 2206.11124) for spectrally expressible noise.

    Args:
        curvatures:
            Eigenvalues ``h_k`` of the loss's Hessian, descending, shape ``(r,)``.
        n_samples:
            N.
        batch_size:
            Shape ``(K,)``.
        momentum:
            Shape ``(K,)``.

    Returns:
        Learning rates, of shape ``(K,)``. Infinity where nothing is curved.
    """
    if not curvatures[0] > 0:
        return np.full(len(batch_size), np.inf)
    h = curvatures[curvatures > 0][None, :]
    m = momentum[:, None]
    gamma = ((n_samples - batch_size) / (max(n_samples - 1, 1) * batch_size))[:, None]
    high = 2.0 * (1.0 + momentum) / curvatures[0]
    low: NDArray[np.float64] = np.zeros_like(high)
    for _ in range(50):
        middle = 0.5 * (low + high)
        step = middle[:, None] * h
        total = (gamma * step * (1 + m) / ((1 - m) * (2 * (1 + m) - step))).sum(axis=1)
        stable = total < 1.0
        low, high = np.where(stable, middle, low), np.where(stable, high, middle)
    return low
