"""Simulated training curves, and the steps at which they reach a target or a loss level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._target import Target


Record = list[tuple[float, ...]]
# The shortest time, in steps, so that its logarithm is finite.
_EARLIEST = 0.1


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Simulated training curves of K configurations at up to T recorded steps each."""

    steps: Floats
    """Recorded steps, starting with 0, of shape ``(K, T)``; NaN after a curve's end."""
    curves: dict[str, Floats]
    """Each recorded quantity at these steps, of shape ``(K, T)``; NaN after a curve's end.
    ``"loss"`` and ``"accuracy"`` are those of all training samples, ``"validation_loss"`` and
    ``"validation_accuracy"`` those of the validation samples if there are any, and
    ``"smoothed_loss"`` is the smoothed loss of the mini-batches if a smoothing is given."""
    blown_up: Booleans
    """True if the loss became infinite, NaN or a hundred times the initial loss, ``(K,)``."""
    strides: Integers
    """Optimiser steps per simulated step, ``(K,)``; if it is one, every step was simulated."""

    @classmethod
    def of_records(
        cls, records: list[Record], quantities: list[str], blown_up: Booleans, strides: Integers
    ) -> Trajectories:
        """Return the curves of K records, padded with NaN to the length of the longest record.

        Each row of a record is a step and the values of the quantities at that step.
        """
        length = max(map(len, records), default=0)
        padded = np.full((1 + len(quantities), len(records), length), np.nan)
        for k, record in enumerate(records):
            padded[:, k, : len(record)] = np.array(record).T
        return cls(padded[0], dict(zip(quantities, padded[1:], strict=True)), blown_up, strides)

    def first_passage_times(self, target: Target) -> Floats:
        """Return the first whole step, ``(K,)``, at which each curve is at the target.

        Infinite if the target is not reached or the loss blew up.
        """
        return np.ceil(self.crossings(target) - 1e-9)

    def crossings(self, target: Target) -> Floats:
        """Return the real-valued step ``(K,)`` of :meth:`Target.crossing` of each curve.

        Infinite if the target is not reached or the loss blew up.
        """
        watched = self.curves[target.quantity]
        steps = [target.crossing(s, w) for s, w in zip(self.steps, watched, strict=True)]
        return np.where(self.blown_up, np.inf, np.array(steps, dtype=np.float64))

    def log_first_passage_times(self, levels: Floats) -> Floats:
        """Return logarithms ``(K, P)`` of the steps at which curves first reach losses ``(P,)``.

        NaN if a curve does not fall to a loss.
        """
        if not self.steps.size:
            return np.full((len(self.steps), len(levels)), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            losses = np.log(np.where(np.isfinite(self.steps), self.curves["loss"], np.nan))
            lowest = np.fmin.accumulate(losses, axis=1)
            below = lowest[:, None, :] <= np.log(levels)[None, :, None]
            place = below.argmax(axis=2)
            rows = np.arange(len(losses))[:, None]
            after, before = losses[rows, place], losses[rows, np.maximum(place - 1, 0)]
            share = np.where(place > 0, (before - np.log(levels)) / (before - after), 0.0)
            first, last = self.steps[rows, np.maximum(place - 1, 0)], self.steps[rows, place]
            times = np.maximum(first + share * (last - first), _EARLIEST)
        return np.where(below.any(axis=2), np.log(times), np.nan)
