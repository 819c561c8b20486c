"""The learning rate above which training fails: a prior, and its update by trials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._rules import DivergenceRules
from optuna_ttp.calibration._rules import RULES


# Values of `log c` at which the distribution is tabulated.
_GRID = np.log(4.2) + np.linspace(-6.0, 6.0, 241)


@dataclass(frozen=True, eq=False)
class DivergenceLimit:
    """The distribution of the learning rate above which a network does not recover.

    Above the stability limit a network first goes through a loss spike, from which it may recover:
    the catapult of Lewkowycz et al., 2020 (arXiv 2003.02218). Up to which learning rate it does,
    differs from network to network. With ``s`` the learning rate over the largest stable one, a
    trial diverges with probability ``expit(log(s / c) / w)``; ``log c`` is a number of the
    network, normally distributed until trials are observed. With other rules the same form gives
    the learning rate above which trials diverge or take longer than predicted.
    """

    probabilities: Floats
    """Probabilities of ``log c`` on a fixed grid, summing to one, shape ``(241,)``."""
    rules: DivergenceRules = RULES.divergence
    """The prior of ``log c``, and the width ``w``."""

    @classmethod
    def of(
        cls,
        stability: ArrayLike = (),
        diverged: ArrayLike = (),
        rules: DivergenceRules = RULES.divergence,
    ) -> DivergenceLimit:
        """Return the posterior after n trials at ``s = stability``; ``diverged`` is a mask.

        Without trials it is the prior: half of all networks diverge at ``s`` of 4.2.
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
        """Return the probability, in the shape of ``s = stability``, of never recovering."""
        from scipy.special import expit

        with np.errstate(divide="ignore"):
            away = np.log(np.asarray(stability, dtype=np.float64))[..., None] - _GRID
        return np.asarray(expit(away / self.rules.width) @ self.probabilities)
