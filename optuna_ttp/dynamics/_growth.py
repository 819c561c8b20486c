"""The growth of the kernel while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from optuna_ttp._util.arrays import Floats


@dataclass(frozen=True)
class GrowthRules:
    """The limit within which two estimates of a kernel's growth are averaged."""

    most_disagreement: float = math.log(3.0)
    """Largest difference of the estimates' logarithms that counts; the second estimate is clipped
    to it. Chosen on the first draw of each network in benchmarks/accuracy."""


RULES = GrowthRules()


@dataclass(frozen=True, eq=False)
class KernelGrowth:
    """A factor ``kappa(l)`` by which the kernel is multiplied at the training loss ``l``.

    The kernel is ``kappa(l) Theta``: its eigenvectors stay as they are, its eigenvalues change.
    """

    fractions: Floats
    """Training loss over the initial training loss, descending from 1, shape ``(P,)``."""
    factors: Floats
    """``kappa`` at these fractions, positive, shape ``(P,)``. It is constant beyond the ends; in
    between its logarithm is linear in the logarithm of the fraction."""

    @classmethod
    def from_probe(
        cls,
        fractions: Floats,
        relative_displacements: Floats,
        kernel_ratios: Floats,
        rules: GrowthRules = RULES,
    ) -> KernelGrowth:
        """Return the growth at loss fractions ``(P,)``: the geometric mean of two estimates.

        The first estimate is ``(1 + rho^2)^2`` with the head's relative displacement ``rho``,
        ``(P,)``: a head ``W`` on features ``phi`` has the kernel ``|phi|^2`` from its own weights
        and one proportional to ``|W|^2`` from the weights below it. If training moves the head by
        ``rho |W_0|``, at a right angle to its random start, ``|W|^2`` is multiplied by
        ``1 + rho^2``, and in a balanced network so are the features along the same directions.

        The second estimate is the kernel ratio ``|J(w)^T u|^2 / |J(w_0)^T u|^2``, ``(P,)``, along
        the gradient ``u`` at the displaced weights ``w``. It includes the layers below the head,
        but it is too large, because training follows the curved network and moves less far than
        the linearised path. So it is clipped to between a third and three times the first one.

        This is a heuristic of this package, not of the paper; ``benchmarks/accuracy`` measures it
        and each estimate alone. Points at which an estimate is not finite are left out.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            head = 2.0 * np.log1p(relative_displacements**2)
            most = rules.most_disagreement
            logs = head + 0.5 * np.clip(np.log(kernel_ratios) - head, -most, most)
        known = np.isfinite(logs)
        return cls(fractions[known], np.exp(logs[known]))

    def at(self, fraction: Floats) -> Floats:
        """Return ``kappa`` at fractions of the initial training loss, in the same shape."""
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = -np.log(np.maximum(fraction, 1e-300))
        logs = np.interp(wanted, -np.log(self.fractions), np.log(self.factors))
        return np.exp(logs)

    def times(self, depths: Floats, log_factors: Floats) -> KernelGrowth:
        """Return the product of this growth and another growth, tabulated at the points of both.

        ``log_factors`` are logarithms of the other growth at the depths ``log(1 / fraction)``,
        both ``(M,)``, ascending from 0; beyond the last depth the other growth is constant.
        """
        depths_here = -np.log(self.fractions)
        every = np.union1d(depths_here, depths)
        logs = np.interp(every, depths_here, np.log(self.factors))
        logs = logs + np.interp(every, depths, log_factors)
        return KernelGrowth(np.exp(-every), np.exp(logs))

    @classmethod
    def none(cls) -> KernelGrowth:
        """Return the growth of a frozen kernel: ``kappa`` is one at every loss."""
        return cls(np.ones(1), np.ones(1))
