"""How the kernel grows while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


# By how much, as a logarithm, the kernel at the displaced weights may differ from what their
# displacement says. Chosen on the first draw of each network in benchmarks/accuracy.
_MOST_DISAGREEMENT = np.log(3.0)


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
    def from_probe(
        cls,
        fractions: NDArray[np.float64],
        relative_displacements: NDArray[np.float64],
        kernel_ratios: NDArray[np.float64],
    ) -> KernelGrowth:
        """Predict the growth from how far the weights have to go and what the kernel is there.

        Two estimates, neither of which holds for all networks; their geometric mean is taken.

        From the displacement alone: a head ``W`` on features ``phi`` has the kernel ``|phi|^2``
        from its own weights and one proportional to ``|W|^2`` from the weights below it. Where
        training moves the head by ``rho |W_0|``, at a right angle to its random start, ``|W|^2``
        grows by ``1 + rho^2``, and so do, in a balanced network, the features along the same
        directions: ``(1 + rho^2)^2``.

        From the network at the displaced weights: ``|J(w)^T u|^2 / |J(w_0)^T u|^2`` along the
        gradient ``u`` that training follows there. It also sees what happens below the head, but
        it overshoots there, because training follows the curved network and goes less far than
        the linearised path. So it is taken for at most three times the first one, or a third.

        A heuristic of this package, not of the paper; what it is worth, and each of the two
        alone, stands in ``benchmarks/accuracy``.

        Args:
            fractions:
                Training loss over the initial one, descending from 1, shape ``(P,)``.
            relative_displacements:
                ``rho`` there on the path of the frozen kernel, shape ``(P,)``.
            kernel_ratios:
                The ratio there, shape ``(P,)``. Where one of both is not finite nothing is
                predicted.

        Returns:
            The growth.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            head = 2.0 * np.log1p(relative_displacements**2)
            rest = np.clip(np.log(kernel_ratios) - head, -_MOST_DISAGREEMENT, _MOST_DISAGREEMENT)
            logs = head + 0.5 * rest
        known = np.isfinite(logs)
        return cls(fractions[known], np.exp(logs[known]))

    def at(self, fraction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``kappa`` at losses over the initial one, of any shape."""
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = -np.log(np.maximum(fraction, 1e-300))
        logs = np.interp(wanted, -np.log(self.fractions), np.log(self.factors))
        return np.exp(logs)

    def times(self, depths: NDArray[np.float64], log_factors: NDArray[np.float64]) -> KernelGrowth:
        """Return this growth times another one.

        Args:
            depths:
                ``log(1 / fraction)`` where the other is given, ascending from 0, shape ``(M,)``.
            log_factors:
                Logarithm of the other there, shape ``(M,)``. Constant beyond the end.

        Returns:
            The product, at the points of both.
        """
        own = -np.log(self.fractions)
        every = np.union1d(own, depths)
        logs = np.interp(every, own, np.log(self.factors)) + np.interp(every, depths, log_factors)
        return KernelGrowth(np.exp(-every), np.exp(logs))

    @classmethod
    def none(cls) -> KernelGrowth:
        """Return the growth of a kernel that does not grow."""
        return cls(np.ones(1), np.ones(1))
