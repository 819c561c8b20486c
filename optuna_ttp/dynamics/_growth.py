"""How the kernel grows while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from optuna_ttp._util.arrays import Floats


@dataclass(frozen=True)
class GrowthRules:
    """How the two estimates of a kernel's growth are joined."""

    most_disagreement: float = math.log(3.0)
    """Most that the kernel at the displaced weights may differ, as a logarithm, from what the
    displacement says. Chosen on the first draw of each network in benchmarks/accuracy."""


RULES = GrowthRules()


@dataclass(frozen=True, eq=False)
class KernelGrowth:
    """A factor ``kappa(l)`` on the kernel as a function of the loss ``l``, for all configurations.

    The network's kernel is taken to be ``kappa(l) Theta``: its directions stay, its speed changes.
    """

    fractions: Floats
    """Training loss over the initial one, descending from 1, shape ``(P,)``."""
    factors: Floats
    """``kappa`` there, positive. Constant beyond the ends, log-log-linear in between."""

    @classmethod
    def from_probe(
        cls,
        fractions: Floats,
        relative_displacements: Floats,
        kernel_ratios: Floats,
        rules: GrowthRules = RULES,
    ) -> KernelGrowth:
        """Predict the growth at loss fractions ``(P,)`` as the geometric mean of two estimates.

        Neither of them holds for all networks.

        From the displacement ``rho`` of the head alone: a head ``W`` on features ``phi`` has the
        kernel ``|phi|^2`` from its own weights and one proportional to ``|W|^2`` from the weights
        below it. Where training moves the head by ``rho |W_0|``, at a right angle to its random
        start, ``|W|^2`` grows by ``1 + rho^2``, and so do, in a balanced network, the features
        along the same directions: ``(1 + rho^2)^2``.

        From the network at the displaced weights: ``|J(w)^T u|^2 / |J(w_0)^T u|^2`` along the
        gradient ``u`` that training follows there. It also sees what happens below the head, but
        it overshoots there, because training follows the curved network and goes less far than
        the linearised path. So it is taken for at most three times the first one, or a third.

        A heuristic of this package, not of the paper; ``benchmarks/accuracy`` measures it and each
        of the two estimates alone. Points where one of both is not finite are left out.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            head = 2.0 * np.log1p(relative_displacements**2)
            most = rules.most_disagreement
            logs = head + 0.5 * np.clip(np.log(kernel_ratios) - head, -most, most)
        known = np.isfinite(logs)
        return cls(fractions[known], np.exp(logs[known]))

    def at(self, fraction: Floats) -> Floats:
        """Return ``kappa`` at losses over the initial one, of any shape."""
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = -np.log(np.maximum(fraction, 1e-300))
        logs = np.interp(wanted, -np.log(self.fractions), np.log(self.factors))
        return np.exp(logs)

    def times(self, depths: Floats, log_factors: Floats) -> KernelGrowth:
        """Return the product of this growth and another one, at the points of both.

        The other one's logarithms ``(M,)`` are given at depths ``log(1 / fraction)``, ascending
        from 0; it is constant beyond them.
        """
        depths_here = -np.log(self.fractions)
        every = np.union1d(depths_here, depths)
        logs = np.interp(every, depths_here, np.log(self.factors))
        logs = logs + np.interp(every, depths, log_factors)
        return KernelGrowth(np.exp(-every), np.exp(logs))

    @classmethod
    def none(cls) -> KernelGrowth:
        """Return the growth of a kernel that does not grow."""
        return cls(np.ones(1), np.ones(1))
