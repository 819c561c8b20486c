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

    def at(self, fraction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``kappa`` at losses over the initial one, of any shape."""
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = -np.log(np.maximum(fraction, 1e-300))
        logs = np.interp(wanted, -np.log(self.fractions), np.log(self.factors))
        return np.exp(logs)
