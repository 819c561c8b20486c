"""The steps in which gradient descent with momentum covers a distance."""

from __future__ import annotations

import numpy as np

from optuna_ttp._util.arrays import Floats


_NEWTON_STEPS = 6


def first_passage_time(distance: Floats, root: Floats, speed: Floats, lag: Floats) -> Floats:
    """Return the steps ``(K,)`` that a heavy ball takes for a distance under a constant gradient.

    Solves ``root (root t - lag (root - speed) (1 - exp(-t / lag))) = distance``, the distance of
    ``lag x'' + x' = root^2`` with ``x'(0) = root speed``, by Newton's method, from the side on
    which it cannot overshoot: Polyak's heavy ball (1964) in continuous time. All arguments are
    positive and of shape ``(K,)``: ``distance`` in units of the effective learning rate times
    steps, ``root`` the square root of the final speed, ``speed`` the initial speed over ``root``
    (it may be zero), and ``lag = m / (1 - m)`` in steps.
    """
    late = distance / root**2 + lag
    early = np.sqrt(2.0 * lag * distance) / root + distance / root**2
    t = np.where(speed < root, np.minimum(late, early), 0.0)
    t = np.where(speed < root, np.maximum(t, 1e-12), distance / np.maximum(root * speed, 1e-300))
    for _ in range(_NEWTON_STEPS):
        # expm1 keeps one minus the decay exact if it is tiny.
        settled = -np.expm1(-t / lag)
        away = root * (root * t - lag * (root - speed) * settled) - distance
        t = np.maximum(t - away / (root * (speed + (root - speed) * settled)), 1e-3 * t)
    return t
