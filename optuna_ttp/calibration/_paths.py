"""Corrected times: the steps in which a heavy ball follows a simulated path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._rules import GrowthPriorRules
from optuna_ttp.dynamics import first_passage_time


def corrected(
    simulated: SimulatedFirstPassages, weights: Floats, rules: GrowthPriorRules
) -> tuple[Floats, Floats]:
    """Return corrected logarithmic times, ``(K, P)``, and their derivatives, ``(K, P, W)``.

    The derivatives are with respect to the ``weights`` ``(W,)``: ``u`` at :data:`KNOTS` and the
    effects of the covariates and of instability.
    """
    times, slopes = Paths.of(simulated, weights, rules).times(derivatives=True)
    return np.log(times), slopes / times[:, :, None]


@dataclass(frozen=True, eq=False)
class Paths:
    """Simulated paths from level to level, and the corrected speed at which they are followed."""

    before: Floats
    """Simulated steps from the previous level to each level, ``(K, P)``."""
    roots: Floats
    """Square roots of the kernel's growth in the simulation, up to a factor, ``(K, P)``."""
    faster: Floats
    """Square roots of the corrected growth, up to the same factor, ``(K, P)``."""
    slopes: Floats
    """Derivatives of the logarithm of the corrected growth by the weights, ``(K, P, W)``."""
    lag: Floats
    """Steps by which momentum delays a gradient, ``(K,)``."""

    @classmethod
    def of(
        cls, simulated: SimulatedFirstPassages, weights: Floats, rules: GrowthPriorRules
    ) -> Paths:
        """Return the paths of simulated times, with the growth corrected by weights ``(W,)``."""
        depths, instability = simulated.depths, simulated.instability
        steps = np.exp(simulated.log_steps)
        before = np.maximum(np.diff(steps, axis=1, prepend=0.0), 1e-6 * steps)
        middle = 0.5 * (
            depths + np.concatenate([np.zeros_like(depths[:, :1]), depths[:, :-1]], axis=1)
        )
        hats = _hats(middle)
        shape = steps.shape
        grown = np.broadcast_to(instability / instability[:, :1], shape)
        # The kernel stops growing at the edge of stability.
        bounded = np.broadcast_to(instability / (1.0 + instability / rules.edge), shape)
        slopes = np.concatenate(
            [
                np.broadcast_to(hats, (*shape, len(KNOTS))),
                np.log1p(
                    simulated.covariates[:, None, :] * (bounded / instability[:, :1])[:, :, None]
                ),
                # Instability is not bounded here: far above the edge networks differ most.
                np.log1p(np.broadcast_to(instability, shape) / rules.instability_from)[:, :, None],
            ],
            axis=2,
        )
        known_growth = np.einsum("kpm,km->kp", hats, simulated.growth)
        log_speed = slopes @ weights - known_growth
        # A constant factor on the growth cancels.
        roots = np.sqrt(grown) * np.exp(0.5 * known_growth)
        most = rules.most_log_speed
        faster = roots * np.exp(0.5 * np.clip(log_speed, -most, most))
        slopes = np.where((np.abs(log_speed) < most)[:, :, None], slopes, 0.0)
        return cls(before, roots, faster, slopes, np.maximum(simulated.lag, 1e-9))

    def times(self, *, derivatives: bool = False) -> tuple[Floats, Floats]:
        """Return corrected times at the levels, ``(K, P)``, and their derivatives ``(K, P, W)``.

        The derivatives are with respect to the weights; they are zeros unless requested.
        """
        lag, shape = self.lag, self.faster.shape
        speed, new_speed = np.zeros_like(lag), np.zeros_like(lag)
        times, slopes = np.empty(shape), np.zeros((*shape, self.slopes.shape[2]))
        speed_slope = np.zeros((shape[0], self.slopes.shape[2]))
        for j in range(shape[1]):
            root, new_root, t = self.roots[:, j], self.faster[:, j], self.before[:, j]
            decay = np.exp(-t / lag)
            gone = root * (root * t - lag * (root - speed) * (1.0 - decay))
            speed = root - (root - speed) * decay
            times[:, j] = t = first_passage_time(gone, new_root, new_speed, lag)
            decay, settled = np.exp(-t / lag), -np.expm1(-t / lag)
            reached = new_speed + (new_root - new_speed) * settled
            if derivatives:
                # Implicit differentiation of the equation that the time solves.
                by_root = gone / new_root + new_root * (t - lag * settled)
                by_speed = new_root * lag * settled
                root_slope = 0.5 * new_root[:, None] * self.slopes[:, j]
                slopes[:, j] = (
                    by_root[:, None] * root_slope + by_speed[:, None] * speed_slope
                ) / -(new_root * reached)[:, None]
                speed_slope = (
                    root_slope * settled[:, None]
                    + speed_slope * decay[:, None]
                    + ((new_root - new_speed) * decay / lag)[:, None] * slopes[:, j]
                )
            new_speed = reached
        return np.cumsum(times, axis=1), np.cumsum(slopes, axis=1)


def _hats(depths: Floats) -> Floats:
    """Return the weights of the M knots, ``(..., M)``, by which values at depths are interpolated.

    The depths have the shape ``(...)``; the interpolation is linear.
    """
    place = np.interp(np.nan_to_num(depths), KNOTS, np.arange(len(KNOTS)))
    hats: Floats = np.maximum(0.0, 1.0 - np.abs(place[..., None] - np.arange(len(KNOTS))))
    return hats
