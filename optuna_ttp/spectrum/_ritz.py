"""Ritz pairs: a few pairs that replace the many eigenpairs that a truncation drops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RitzRules:
    """The settings of the condensation of eigenpairs.

    Attributes:
        n_pairs:
            The number of Ritz pairs. Chosen on the digits network truncated to 95 % of the trace:
            two pairs reduce the error of its predicted times from 19 % to nothing; networks
            whose trace is dominated by few directions need more.
        remainder:
            Length of a new Krylov vector up to which it is rounding error: a property
            of the data type, not a choice.
    """

    n_pairs: int = 4
    remainder: float = 1e-8


RULES = RitzRules()


def ritz_pairs(
    eigenvalues: NDArray[np.float64],
    coefficients: NDArray[np.float64],
    n_pairs: int = RULES.n_pairs,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Condense r eigenpairs into at most ``n_pairs`` Ritz pairs with nearly the same loss curve.

    Under gradient flow a squared loss is ``r^T exp(-2 K t) r`` for the initial residual ``r``.
    Lanczos' method started at ``r`` gives the Ritz pairs of the Krylov space ``r, K r, ...``;
    with ``k`` of them the loss is that of Gauss' quadrature with ``k`` abscissae, which shares
    its first ``2 k`` derivatives in time (Golub and Meurant, Matrices, Moments and Quadrature with
    Applications, Princeton 2010, chapters 4 and 7). If eigenpairs are dropped instead, the loss
    does not fall below the residual's part along them.

    Takes positive descending eigenvalues and the residual's coefficients along their eigenvectors,
    both of shape ``(r,)``. Returns Ritz values of shape ``(k,)``, descending, and the matrix
    ``(r, k)`` with orthonormal columns that mixes the eigenvectors into Ritz vectors; ``k`` is
    below ``n_pairs`` if the residual has components along fewer directions.
    """
    basis: list[NDArray[np.float64]] = []
    new = coefficients / max(float(np.linalg.norm(coefficients)), np.finfo(np.float64).tiny)
    for _ in range(min(n_pairs, len(eigenvalues))):
        # After one pass, rounding errors would leave the vectors not orthogonal.
        for _ in range(2):
            for old in basis:
                new = new - old * (old @ new)
        length = float(np.linalg.norm(new))
        if length <= RULES.remainder:
            break
        basis.append(new / length)
        new = eigenvalues / eigenvalues[0] * basis[-1]
    if not basis:
        return np.empty(0), np.empty((len(eigenvalues), 0))
    vectors = np.stack(basis, axis=1)
    values, mixing = np.linalg.eigh(vectors.T @ (eigenvalues[:, None] * vectors))
    return values[::-1].copy(), vectors @ mixing[:, ::-1]
