"""From which learning rate on training fails: what is known, and what trials show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._rules import DivergenceRules
from optuna_ttp.calibration._rules import RULES


# Logarithms of the learning rate over the stability limit at which the belief is tabulated.
_GRID = np.log(4.2) + np.linspace(-6.0, 6.0, 241)


@dataclass(frozen=True, eq=False)
class DivergenceLimit:
    """What is believed about the learning rate from which on a network does not recover.

    Above the stability limit a network first goes through a loss spike, from which it may recover:
    the catapult of Lewkowycz et al., 2020 (arXiv 2003.02218). How far above it still does, differs
    from network to network. With ``s`` the learning rate over the largest stable one, a trial
    diverges with probability ``expit(log(s / c) / w)``; ``log c`` is the network's, normally
    distributed until trials are observed. The same form says, with other rules, from which
    learning rate on trials do not do as predicted.
    """

    probabilities: Floats
    """Of ``log c`` on a grid, summing to one."""
    rules: DivergenceRules = RULES.divergence
    """Its prior and its width ``w``."""

    @classmethod
    def of(
        cls,
        stability: ArrayLike = (),
        diverged: ArrayLike = (),
        rules: DivergenceRules = RULES.divergence,
    ) -> DivergenceLimit:
        """Return the posterior after n trials at ``s``, shape ``(n,)``, some of which diverged.

        Without trials half of all networks diverge at ``s`` of 4.2.
        """
        log_density = -0.5 * ((_GRID - np.log(rules.half)) / rules.network_sd) ** 2
        # A curvature of next to nothing makes a stability of zero.
        logs = np.log(np.maximum(np.asarray(stability, dtype=np.float64), 1e-12))
        away = (logs[:, None] - _GRID) / rules.width
        sign = np.where(np.asarray(diverged, dtype=bool), 1.0, -1.0)[:, None]
        log_density = log_density - np.logaddexp(0.0, -sign * away).sum(axis=0)
        density = np.exp(log_density - log_density.max())
        return cls(density / density.sum(), rules)

    def probability(self, stability: ArrayLike) -> Floats:
        """Return how likely training at ``s``, of any shape, never recovers."""
        from scipy.special import expit

        with np.errstate(divide="ignore"):
            away = np.log(np.asarray(stability, dtype=np.float64))[..., None] - _GRID
        return np.asarray(expit(away / self.rules.width) @ self.probabilities)
