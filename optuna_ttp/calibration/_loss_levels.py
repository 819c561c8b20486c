"""The loss levels at which curves are compared, and the depths of the correction's knots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


# Loss levels: the training loss over the initial one, and (depth) its negative logarithm.
# fmt: off
FRACTIONS = np.array([
    0.95, 0.9, 0.82, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.03,
    0.01, 0.0025,
])
# fmt: on
DEPTHS = -np.log(FRACTIONS)
# Depths between which `u` is interpolated linearly.
KNOTS = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0])
N_COVARIATES = 2


def deepest(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the index of the last finite value along the last axis, the levels; -1 if none is.

    The result has the shape of ``rows`` without the last axis.
    """
    known = np.isfinite(rows)
    last = known.shape[-1] - 1 - known[..., ::-1].argmax(axis=-1)
    return np.asarray(np.where(known.any(axis=-1), last, -1))
