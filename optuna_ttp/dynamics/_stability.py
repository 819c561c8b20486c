"""The largest stable learning rate, and the noise floor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class StabilityLimit:
    """Where heavy-ball SGD stops being mean-square stable, for all batch sizes and momenta.

    The largest stable ``eta`` is the smallest one with ``S(eta) = 1``, where
    ``S = gamma sum_k eta h_k (1 + m) / ((1 - m) (2 (1 + m) - eta h_k))`` and
    ``gamma = (N - B) / ((N - 1) B)``, ``1 / B`` with replacement: the generating-function
    criterion of Velikanov, Kuznedelev and Yarotsky, 2022 (arXiv 2206.11124) for spectrally
    expressible noise. With ``u = eta h_1 / (2 (1 + m))``, the share of the full-batch limit, it
    reads ``gamma (1 + m) / (1 - m) F(u) = 1`` with
    ``F(u) = sum_k u h_k / (h_1 - u h_k)``: one increasing function of one number, tabulated once
    and inverted by interpolation.

    Nesterov's variant is stable up to ``eta h_1 = 2 (1 + m) / (1 + 2 m)`` on full batches; the
    limit is taken to be lower by the same factor ``1 / (1 + 2 m)`` there and at most that of
    heavy ball where noise decides.

    Attributes:
        largest_curvature:
            ``h_1``.
        n_samples:
            N.
        log_u:
            Nodes of the table, ascending, shape ``(P,)``.
        log_f:
            ``log F`` there.
    """

    largest_curvature: float
    n_samples: int
    log_u: NDArray[np.float64]
    log_f: NDArray[np.float64]

    @classmethod
    def of(cls, curvatures: NDArray[np.float64], n_samples: int) -> StabilityLimit:
        """Tabulate the criterion.

        Args:
            curvatures:
                Eigenvalues ``h_k`` of the loss's Hessian, descending, shape ``(r,)``.
            n_samples:
                N.

        Returns:
            The limit.
        """
        largest = float(curvatures[0])
        if not largest > 0:
            return cls(0.0, n_samples, np.zeros(1), np.zeros(1))
        # Dense towards u = 1, where F has its pole.
        distance = np.concatenate([np.geomspace(1e-9, 0.5, 400), np.linspace(0.5, 0.999, 200)[1:]])
        u = np.concatenate([np.geomspace(1e-9, 1e-3, 100), np.sort(1.0 - distance)[1:]])
        shares = curvatures[curvatures > 0] / largest
        f = np.array([(x * shares / (1.0 - x * shares)).sum() for x in u])
        return cls(largest, n_samples, np.log(u), np.log(f))

    def max_learning_rate(
        self,
        batch_size: NDArray[np.float64] | NDArray[np.int64],
        momentum: NDArray[np.float64],
        *,
        nesterov: NDArray[np.bool_] | bool = False,
        replacement: bool = False,
    ) -> NDArray[np.float64]:
        """Return the largest stable learning rate.

        Args:
            batch_size:
                Any shape.
            momentum:
                The same shape.
            nesterov:
                The same shape. Heavy ball by default.
            replacement:
                Whether batches are drawn with replacement. Off by default.

        Returns:
            Learning rates; infinity where nothing is curved.
        """
        if not self.largest_curvature > 0:
            return np.full(np.shape(batch_size), np.inf)
        n, b = self.n_samples, np.asarray(batch_size, dtype=np.float64)
        gamma = 1.0 / b if replacement else np.maximum(n - b, 0.0) / (max(n - 1, 1) * b)
        with np.errstate(divide="ignore"):
            wanted = np.log((1.0 - momentum) / (1.0 + momentum)) - np.log(gamma)
        u = np.exp(np.interp(wanted, self.log_f, self.log_u))
        full = np.where(nesterov, 1.0 + 2.0 * momentum, 1.0)
        return np.where(gamma > 0, u, 1.0) * 2.0 * (1.0 + momentum) / full / self.largest_curvature
