"""How the kernel grows while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class KernelGrowth:
    """A factor ``kappa(l)`` on the kernel as a function of the loss ``l``, for all configurations.

    The network's kernel is taken to be ``kappa(l) Theta``: its directions stay, its speed changes.

    Attributes:
        fractions:
            Training loss over the initial one, descending from 1, shape ``(P,)``.
        factors:
            ``kappa`` there, positive. Constant beyond the ends, log-log-linear in between.
    """

    fractions: NDArray[np.float64]
    factors: NDArray[np.float64]

    @classmethod
    def from_displacements(
        cls, fractions: NDArray[np.float64], relative_displacements: NDArray[np.float64]
    ) -> KernelGrowth:
        """Predict the growth from how far the weights have to go.

        A head ``W`` on features ``phi`` has the kernel ``|phi|^2`` from its own weights and one
        proportional to ``|W|^2`` from the weights below it. Where training moves the head by
        ``rho |W_0|``, at a right angle to its random start, ``|W|^2`` grows by ``1 + rho^2``, and
        so do, in a balanced network, the features along the same directions:
        ``kappa = (1 + rho^2)^2``. A heuristic of this package, not of the paper; what it is worth
        stands in ``benchmarks/accuracy``.

        Args:
            fractions:
                Training loss over the initial one, descending from 1, shape ``(P,)``.
            relative_displacements:
                ``rho`` there on the path of the frozen kernel, shape ``(P,)``. Where it is
                infinite nothing is predicted.

        Returns:
            The growth.
        """
        known = np.isfinite(relative_displacements)
        return cls(fractions[known], (1.0 + relative_displacements[known] ** 2) ** 2)

    def at(self, fraction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``kappa`` at losses over the initial one, of any shape."""
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = -np.log(np.maximum(fraction, 1e-300))
        logs = np.interp(wanted, -np.log(self.fractions), np.log(self.factors))
        return np.exp(logs)
