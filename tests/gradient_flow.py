"""How long gradient flow takes: what approximate spectra are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics import LinearisedModel


if TYPE_CHECKING:
    from optuna_ttp.spectrum import Spectrum


FRACTIONS = (0.5, 0.25, 0.1)
_MAX_STEPS = 3_000
# Of the inverse of the largest curvature: the first step, and the longest one. Steps in between
# are at most a fiftieth of the time that has passed, because in a flat spectrum half of the loss
# is gone in the time of the fastest mode.
_FIRST, _LONGEST, _GROWTH = 0.01, 0.9, 0.02


@dataclass(frozen=True, eq=False)
class Flow:
    """How gradient flow went.

    Attributes:
        times:
            When each fraction of the reducible initial loss was reached; infinite where it was
            not.
        left:
            The fraction at the end.
    """

    times: NDArray[np.float64]
    left: float


@torch.inference_mode()
def follow_flow(
    spectrum: Spectrum, *, rank: int = 200, fractions: tuple[float, ...] = FRACTIONS
) -> Flow:
    """Follow gradient flow to the last of some fractions of its reducible loss, or 3,000 steps.

    Args:
        spectrum:
            Of any engine.
        rank:
            Leading eigenpairs that are followed. 200 by default.
        fractions:
            Descending. 50, 25 and 10 % by default.

    Returns:
        The flow.
    """
    model = LinearisedModel.from_spectrum(
        spectrum.truncate(rank=min(rank, spectrum.rank)), dtype=torch.float64
    )
    theta = model.features.new_zeros((1, model.rank))
    floor = model.loss_floor
    initial = float(model.loss(model.outputs(theta))) - floor
    if not initial > 0.0:
        return Flow(np.full(len(fractions), np.inf), 1.0)
    unit = 1.0 / max(float(model.curvatures[0]), 1e-30)
    time, left, before = 0.0, 1.0, (0.0, 1.0)
    times = np.full(len(fractions), np.inf)
    found = 0
    for _ in range(_MAX_STEPS):
        rate = min(max(_FIRST * unit, _GROWTH * time), _LONGEST * unit)
        theta = theta - rate * model.gradient(theta)
        time += rate
        # Rounding may leave nothing at all.
        left = max((float(model.loss(model.outputs(theta))) - floor) / initial, 1e-300)
        while found < len(fractions) and left <= fractions[found]:
            # Nearly exponential between two steps.
            share = np.log(before[1] / fractions[found]) / np.log(before[1] / left)
            times[found] = before[0] + share * (time - before[0])
            found += 1
        if found == len(fractions):
            break
        before = (time, left)
    return Flow(times, left)
