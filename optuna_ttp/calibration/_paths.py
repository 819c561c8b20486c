"""The corrected clock: how fast the heavy ball takes a simulated path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.dynamics import first_passage_time


# The product of stability and kernel growth from which on instability shows, and where it stops
# growing.
_SHOWS = 1.3
_EDGE = 1.0
# Corrections beyond this factor are no corrections.
_MOST_LOG = 12.0


def corrected(
    passages: SimulatedFirstPassages, weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return corrected logarithmic times, ``(K, P)``, and their derivatives by the weights.

    Args:
        passages:
            As simulated.
        weights:
            ``u`` at :data:`KNOTS` and the effects of the covariates, ``(W,)``.

    Returns:
        Logarithms of times, ``(K, P)``, and derivatives, ``(K, P, W)``.
    """
    times, slopes = Paths.of(passages, weights).times(derivatives=True)
    return np.log(times), slopes / times[:, :, None]


@dataclass(frozen=True, eq=False)
class Paths:
    """Simulated paths from level to level, and how much faster they are taken.

    Attributes:
        before:
            Simulated steps between the levels, ``(K, P)``.
        roots:
            Square roots of the growth that was simulated with, up to a factor, ``(K, P)``.
        faster:
            The same of the corrected growth.
        slopes:
            Derivatives of the logarithm of the corrected growth by the weights, ``(K, P, W)``.
        lag:
            Shape ``(K,)``.
    """

    before: NDArray[np.float64]
    roots: NDArray[np.float64]
    faster: NDArray[np.float64]
    slopes: NDArray[np.float64]
    lag: NDArray[np.float64]

    @classmethod
    def of(cls, passages: SimulatedFirstPassages, weights: NDArray[np.float64]) -> Paths:
        """Lay out the paths.

        Args:
            passages:
                As simulated.
            weights:
                ``u`` at :data:`KNOTS` and the effects of the covariates, ``(W,)``.

        Returns:
            The paths.
        """
        depths, instability = passages.depths, passages.instability
        steps = np.exp(passages.log_steps)
        before = np.maximum(np.diff(steps, axis=1, prepend=0.0), 1e-6 * steps)
        middle = 0.5 * (
            depths + np.concatenate([np.zeros_like(depths[:, :1]), depths[:, :-1]], axis=1)
        )
        hats = _hats(middle)
        shape = steps.shape
        grown = np.broadcast_to(instability / instability[:, :1], shape)
        # The kernel stops growing at the edge of stability.
        bounded = np.broadcast_to(instability / (1.0 + instability / _EDGE), shape)
        slopes = np.concatenate(
            [
                np.broadcast_to(hats, (*shape, len(KNOTS))),
                np.log1p(
                    passages.covariates[:, None, :] * (bounded / instability[:, :1])[:, :, None]
                ),
                # Far above the edge as far as it goes: there networks differ most.
                np.log1p(np.broadcast_to(instability, shape) / _SHOWS)[:, :, None],
            ],
            axis=2,
        )
        simulated = np.einsum("kpm,km->kp", hats, passages.growth)
        log_speed = slopes @ weights - simulated
        # Any multiple of the growth does: it cancels.
        roots = np.sqrt(grown) * np.exp(0.5 * simulated)
        faster = roots * np.exp(0.5 * np.clip(log_speed, -_MOST_LOG, _MOST_LOG))
        slopes = np.where((np.abs(log_speed) < _MOST_LOG)[:, :, None], slopes, 0.0)
        return cls(before, roots, faster, slopes, np.maximum(passages.lag, 1e-9))

    def times(
        self, *, derivatives: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return corrected times at the levels, and their derivatives by the weights.

        Args:
            derivatives:
                Whether they are wanted. They are zeros by default.

        Returns:
            Steps, ``(K, P)``, and derivatives, ``(K, P, W)``.
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
                # Implicit: the time keeps solving its equation as root and speed change.
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


def _hats(depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear interpolation between the nodes, as weights: ``(..., M)``. Constant beyond them."""
    place = np.interp(np.nan_to_num(depths), KNOTS, np.arange(len(KNOTS)))
    hats: NDArray[np.float64] = np.maximum(
        0.0, 1.0 - np.abs(place[..., None] - np.arange(len(KNOTS)))
    )
    return hats
