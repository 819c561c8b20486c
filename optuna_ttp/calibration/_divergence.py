"""From which learning rate on training fails: what is known, and what trials tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


# Learning rate over the stability limit from which half of all networks do not recover in 60
# steps, and its spread from network to network and from configuration to configuration: together
# they are the geometric mean and the spread of the 16 real limits in
# benchmarks/accuracy/results/stability.csv, two small networks with two losses.
_HALF_DIVERGE = 4.2
_NETWORK_SD = 1.0
_WIDTH = 0.25
_LEAST = 1e-12
_GRID = np.log(_HALF_DIVERGE) + np.linspace(-6.0, 6.0, 241)


@dataclass(frozen=True, eq=False)
class DivergenceLimit:
    """What is believed about the learning rate from which on a network does not recover.

    Above the stability limit a network first goes through a loss spike, from which it may recover:
    the catapult of Lewkowycz et al., 2020 (arXiv 2003.02218). How far above it still does, differs
    from network to network. With ``s`` the learning rate over the largest stable one, a trial
    diverges with probability ``expit(log(s / c) / w)``; ``log c`` is the network's, normally
    distributed until trials tell. The same form says, with another ``c``, from which learning rate
    on trials do not do as predicted.

    Attributes:
        probabilities:
            Of ``log c`` on a grid, summing to one.
    """

    probabilities: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        stability: ArrayLike = (),
        diverged: ArrayLike = (),
        *,
        half: float = _HALF_DIVERGE,
        spread: float = _NETWORK_SD,
    ) -> DivergenceLimit:
        """Return what trials tell. Without any, half of all networks diverge at 4.2 times.

        Example:
            >>> float(DivergenceLimit.of().probability(4.2))
            0.5
            >>> bool(DivergenceLimit.of([3.0], [True]).probability(3.5) > 0.6)
            True

        Args:
            stability:
                Learning rates of trials over the largest stable one, positive, shape ``(n,)``.
            diverged:
                Whether they did, shape ``(n,)``.
            half:
                Where half of all networks diverge, before any trial. 4.2 by default.
            spread:
                Standard deviation of the logarithm from network to network. One by default.

        Returns:
            The posterior.
        """
        log_density = -0.5 * ((_GRID - np.log(half)) / spread) ** 2
        # A curvature of next to nothing makes a stability of zero.
        logs = np.log(np.maximum(np.asarray(stability, dtype=np.float64), _LEAST))
        away = (logs[:, None] - _GRID) / _WIDTH
        sign = np.where(np.asarray(diverged, dtype=bool), 1.0, -1.0)[:, None]
        log_density = log_density - np.logaddexp(0.0, -sign * away).sum(axis=0)
        density = np.exp(log_density - log_density.max())
        return cls(density / density.sum())

    def probability(self, stability: ArrayLike) -> NDArray[np.float64]:
        """Return how likely training never recovers.

        Args:
            stability:
                Learning rate over the largest stable one, any shape.

        Returns:
            Probabilities of the same shape.
        """
        from scipy.special import expit

        with np.errstate(divide="ignore"):
            away = np.log(np.asarray(stability, dtype=np.float64))[..., None] - _GRID
        return np.asarray(expit(away / _WIDTH) @ self.probabilities)
