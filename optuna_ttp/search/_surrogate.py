"""A small Gaussian process of a study's values over predicted features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A Gaussian process of the values over predicted features of configurations.

    Attributes:
        x: Standardised features of the k trials with a value, ``(features - mean) / sd``, shape
            ``(k, F)``.
        solved: Inverse covariance times the normal scores of the values, shape ``(k,)``.
        inverse: Inverse covariance, shape ``(k, k)``.
        mean: Mean of each raw feature over the search space, shape ``(F,)``.
        sd: Standard deviation of each raw feature over the search space, shape ``(F,)``.
        skill: Agreement in rank of the values with their leave-one-out predictions, in [0, 1].
    """

    x: NDArray[np.float64]
    solved: NDArray[np.float64]
    inverse: NDArray[np.float64]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    skill: float

    @classmethod
    def fit(
        cls,
        x: NDArray[np.float64],
        values: NDArray[np.float64],
        mean: NDArray[np.float64],
        sd: NDArray[np.float64],
        noise: float,
    ) -> Surrogate:
        """Fit the process to k values, smaller is better, at standardised features ``x``.

        ``mean`` and ``sd`` standardise raw features; ``noise`` is the standard deviation of the
        noise of a value's normal score.
        """
        from scipy.special import ndtri
        from scipy.stats import kendalltau
        from scipy.stats import rankdata

        # Normal scores depend on ranks only, so that a huge loss is not an outlier.
        y = np.asarray(ndtri((rankdata(values) - 0.5) / len(values)), dtype=np.float64)
        kernel = _kernel(x, x) + noise**2 * np.eye(len(x))
        inverse = np.linalg.inv(kernel)
        solved = inverse @ y
        # These are the leave-one-out predictions (Rasmussen and Williams, 2006, equation 5.12).
        held_out = y - solved / np.diag(inverse)
        tau = float(np.nan_to_num(kendalltau(held_out, y).statistic))
        n = len(y)
        skill = min(1.0, max(0.0, 1.5 * tau)) * n / (n + 4.0)
        return cls(x, solved, np.asarray(inverse, dtype=np.float64), mean, sd, skill)

    def optimistic(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return an optimistic score of K configurations, ``(K,)``, of which larger is better.

        It is minus the predicted mean plus one standard deviation, both of the normal score of
        the value. ``features`` are the raw ones, ``(K, F)``.
        """
        k = _kernel((features - self.mean) / self.sd, self.x)
        variance = 1.0 - ((k @ self.inverse) * k).sum(axis=1)
        return np.asarray(-(k @ self.solved) + np.sqrt(np.maximum(variance, 1e-12)))


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gaussian kernel ``exp(-|a_i - b_j|^2 / 2)`` of the rows of a and b."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2.0 * a @ b.T
    return np.asarray(np.exp(-0.5 * np.maximum(squares, 0.0)))


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values in which the largest float replaces infinity and NaN, of the same shape."""
    return np.where(np.isfinite(values), values, np.finfo(np.float64).max)
