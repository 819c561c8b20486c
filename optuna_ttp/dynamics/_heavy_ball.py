"""How long a heavy ball takes for a way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


_NEWTON_STEPS = 6


def first_passage_time(
    way: NDArray[np.float64],
    root: NDArray[np.float64],
    speed: NDArray[np.float64],
    lag: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the time that a heavy ball takes for a way whose gradient is constant.

    Solves ``root (root t - lag (root - speed) (1 - exp(-t / lag))) = way``, the way of ``lag x'' +
    x' = root^2`` with ``x'(0) = root speed``, by Newton's method, from the side on which it cannot
    overshoot: Polyak's heavy ball (1964) in continuous time.

    Args:
        way:
            In units of the effective learning rate times steps, positive, shape ``(K,)``.
        root:
            Square root of the final speed, positive, shape ``(K,)``.
        speed:
            Speed at the start over ``root``, shape ``(K,)``.
        lag:
            ``m / (1 - m)`` steps, positive, shape ``(K,)``.

    Returns:
        Steps, shape ``(K,)``.
    """
    late = way / root**2 + lag
    t = np.where(
        speed < root, np.minimum(late, np.sqrt(2.0 * lag * way) / root + way / root**2), 0.0
    )
    t = np.where(speed < root, np.maximum(t, 1e-12), way / np.maximum(root * speed, 1e-300))
    for _ in range(_NEWTON_STEPS):
        # One minus the decay, exactly where it is tiny.
        settled = -np.expm1(-t / lag)
        away = root * (root * t - lag * (root - speed) * settled) - way
        t = np.maximum(t - away / (root * (speed + (root - speed) * settled)), 1e-3 * t)
    return t
