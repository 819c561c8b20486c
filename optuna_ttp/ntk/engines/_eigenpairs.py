"""Eigenpairs of the kernel, in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.ntk.layers._rules import PRODUCTS
from optuna_ttp.spectrum import LowRankLayer
from optuna_ttp.spectrum import SampledJacobian


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """The largest eigenpairs of a symmetric positive semi-definite matrix.

    The ``r`` eigenvalues are positive and descend, the eigenvectors are orthonormal columns of
    shape ``(N C, r)``, and the trace is that of the whole matrix, with all eigenvalues.
    """

    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.float64]
    trace: float


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The result of an engine: the leading eigenpairs of the kernel, and products with them.

    ``weight_outputs`` are ``J diag(c) w_0``, of shape ``(N, C)``, and ``validation_features``
    ``J_v J^T V Lambda^(-1/2)``, of shape ``(N_v C, r)``, None without validation samples. The
    other fields are those of :class:`~optuna_ttp.Spectrum` and of its metadata.
    """

    pairs: Eigenpairs
    weight_outputs: NDArray[np.float64]
    validation_features: NDArray[np.floating[Any]] | None
    decay_factors: NDArray[np.float64] | None = None
    time_error: float | None = None
    trace_error: float | None = None
    n_ritz: int = 0
    jacobian: SampledJacobian | None = None
    low_rank: tuple[LowRankLayer, ...] = ()


@without_autocast
def eigenpairs(gram: NDArray[Any], *, rank: int | None = None) -> Eigenpairs:
    """Decompose a kernel matrix of shape ``(n, n)`` in double precision.

    Returns the pairs whose eigenvalues are above the rounding error of the input's precision, at
    most the leading ``rank``. ValueError is raised if the matrix is not finite, or has no positive
    trace (no output depends on a trainable parameter).
    """
    n = len(gram)
    trace = float(np.trace(gram, dtype=np.float64))
    if not np.isfinite(gram).all():
        raise ValueError(
            f"The kernel must be finite but overflowed in {gram.dtype}. Scale the inputs, or "
            'compute with dtype="float64".'
        )
    if not trace > 0:
        raise ValueError("The Jacobian must not be zero: no trainable parameter moves any output.")
    matrix = gram.astype(np.float64)
    if rank is not None and n > 1500 and rank < n // 5:
        from scipy.sparse.linalg import eigsh

        # The start vector is fixed, so that the same matrix gives the same pairs.
        start = np.random.default_rng(0).standard_normal(n)
        values, vectors = eigsh(matrix, k=rank, v0=start)
    else:
        from scipy.linalg import eigh

        values, vectors = eigh(matrix, overwrite_a=True, driver="evd")
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    # This is the rounding error of the matrix, or of its decomposition.
    floor = values[0] * max(np.finfo(gram.dtype).eps, n * np.finfo(np.float64).eps)
    n_pairs = int(np.count_nonzero(values > floor))
    if rank is not None:
        n_pairs = min(n_pairs, rank)
    return Eigenpairs(values[:n_pairs].copy(), vectors[:, :n_pairs].copy(), trace)


def eigenpairs_of_features(
    features: torch.Tensor,
    *,
    rank: int | None = None,
    trace: float | None = None,
) -> Eigenpairs:
    """Return the leading ``rank`` eigenpairs (by default all) of ``Z Z^T`` for ``Z``, ``(n, d)``.

    If ``d < n``, ``Z^T Z = V S^2 V^T`` is decomposed instead, and ``Z V S^(-1)`` are the
    eigenvectors. The result has the ``trace`` that is given, by default that of ``Z Z^T``.
    """
    n, width = features.shape
    if n <= width:
        pairs = eigenpairs(_products(features.T), rank=rank)
        return pairs if trace is None else replace(pairs, trace=trace)
    dual = eigenpairs(_products(features), rank=rank)
    scaled = dual.eigenvectors / np.sqrt(dual.eigenvalues)
    vectors = features @ torch.as_tensor(scaled, dtype=features.dtype, device=features.device)
    return Eigenpairs(
        dual.eigenvalues,
        vectors.cpu().numpy().astype(np.float64),
        dual.trace if trace is None else trace,
    )


def _products(matrix: torch.Tensor) -> NDArray[Any]:
    """Return ``M^T M`` in the precision of ``M``, with sums over many rows in double precision.

    Only the lower triangle is multiplied, in tiles, and then mirrored.
    """
    n = matrix.shape[1]
    total = torch.zeros((n, n), dtype=torch.float64)
    tile = max(PRODUCTS.max_tile, n // PRODUCTS.n_tiles)
    for start in range(0, len(matrix), PRODUCTS.chunk):
        piece = matrix[start : start + PRODUCTS.chunk]
        for first in range(0, n, tile):
            last = min(first + tile, n)
            total[first:last, :last] += (piece[:, first:last].T @ piece[:, :last]).cpu()
    whole = total.tril() + total.tril(-1).T
    precision = np.float32 if matrix.dtype == torch.float32 else np.float64
    return whole.numpy().astype(precision)
