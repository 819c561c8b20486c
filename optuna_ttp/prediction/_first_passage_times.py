"""The predicted first passage times of the loss levels and the target, and predicted curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories


@dataclass(frozen=True, eq=False)
class FirstPassageTimes:
    """Predicted times of K configurations at P loss levels, the last of which is the target."""

    depths: Floats
    """Logarithm of the initial training loss over the loss level, shape ``(K, P)``. Levels below
    the target's loss are replaced by it."""
    log_steps: Floats
    """Mean over the seeds of the logarithm of the steps to each level, shape ``(K, P)``; NaN if
    the level is not reached."""
    log_sd: Floats
    """Standard deviation over the seeds of that logarithm at the target, shape ``(K,)``."""
    blown_up: Booleans
    """True if the loss blew up in most seeds, shape ``(K,)``."""
    strides: Integers
    """Optimiser steps per simulated step, shape ``(K,)``."""
    curve_steps: Floats
    """Steps of the curves of the first seed, shape ``(K, T)``; NaN after a curve's end."""
    curves: dict[str, Floats]
    """Simulated quantities at these steps, by name, each of shape ``(K, T)``."""

    @classmethod
    def of(
        cls, runs: Sequence[Trajectories], target: Target, initial_loss: float
    ) -> FirstPassageTimes:
        """Return the times of simulations, one per seed, at the fixed levels and the target.

        A time is NaN if most seeds do not reach the level.
        """
        crossings = np.array([run.crossings(target) for run in runs])
        log_target, log_sd = _mean_over_seeds(np.log(np.maximum(crossings, 1e-9)))
        levels, _ = _mean_over_seeds(
            np.array([run.log_first_passage_times(initial_loss * np.exp(-DEPTHS)) for run in runs])
        )
        deepest = _depths_at_target(runs[0], target, initial_loss, log_target)
        bound = np.where(np.isfinite(deepest), deepest, np.inf)[:, None]
        every_depth = np.append(DEPTHS, np.inf)[None, :]
        times = np.concatenate([levels, log_target[:, None]], axis=1)
        reached = np.isfinite(log_target)[:, None]
        # A level that the mean over the seeds puts after the target is passed with it.
        times = np.where(every_depth < bound, times, log_target[:, None])
        times = np.where(reached, np.fmin(times, log_target[:, None]), times)
        return cls(
            np.minimum(every_depth, bound),
            np.maximum.accumulate(times, axis=1),
            np.nan_to_num(log_sd),
            2 * np.array([run.blown_up for run in runs]).sum(axis=0) > len(runs),
            runs[0].strides,
            runs[0].steps,
            runs[0].curves,
        )

    @classmethod
    def interpolated(
        cls, depths: Floats, log_steps: Floats, blown_up: Booleans
    ) -> FirstPassageTimes:
        """Return the times of a response surface, without curves.

        Its ``depths`` ``(Q,)`` end with the target's, ``log_steps`` are its logarithmic times
        ``(K, Q)``; rows with ``blown_up``, ``(K,)``, have NaN.
        """
        place = np.minimum(np.arange(len(DEPTHS) + 1), len(depths) - 1)
        logs = np.where(blown_up[:, None], np.nan, log_steps[:, place])
        return cls(
            np.broadcast_to(depths[place], logs.shape),
            logs,
            np.zeros(len(logs)),
            blown_up,
            np.ones(len(logs), dtype=np.int64),
            np.empty((len(logs), 0)),
            {},
        )

    def placed(self, count: int, rows: Integers) -> FirstPassageTimes:
        """Return ``count`` rows: these times at the indices ``rows``, all others blown up."""

        def among(value: Any, simulated: NDArray[Any]) -> NDArray[Any]:
            """Return an array that holds the value in all rows that were not simulated."""
            every = np.full((count, *simulated.shape[1:]), value, dtype=simulated.dtype)
            every[rows] = simulated
            return every

        return FirstPassageTimes(
            among(np.append(DEPTHS, np.inf), self.depths),
            among(math.nan, self.log_steps),
            among(0.0, self.log_sd),
            among(True, self.blown_up),
            among(1, self.strides),
            among(math.nan, self.curve_steps),
            {name: among(math.nan, curve) for name, curve in self.curves.items()},
        )

    def updated(self, other: FirstPassageTimes, rows: Integers) -> FirstPassageTimes:
        """Return these times with ``other`` at the indices ``rows``, but the same curves."""

        def merged(values: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
            values = values.copy()
            values[rows] = others
            return values

        return replace(
            self,
            depths=merged(self.depths, other.depths),
            log_steps=merged(self.log_steps, other.log_steps),
            log_sd=merged(self.log_sd, other.log_sd),
            blown_up=merged(self.blown_up, other.blown_up),
        )

    def on_levels(self, values: Floats) -> Floats:
        """Return values ``(K, P)`` at the P - 1 fixed levels; NaN at levels below the target."""
        return np.where(DEPTHS[None, :] <= self.depths[:, -1:] + 1e-6, values[:, :-1], np.nan)

    def warped_curve_steps(self, log_steps: Floats) -> Floats:
        """Return the steps ``(K, T)`` of curves whose time is stretched as the corrections say.

        The curves then pass their loss levels at the corrected times.

        ``log_steps`` are logarithms of the corrected times, ``(K, P)``. Steps between levels are
        interpolated linearly; after the last level they are stretched by the factor at that level.
        """
        result = self.curve_steps.copy()
        for row, before, after in zip(result, self.log_steps, log_steps, strict=True):
            known = np.isfinite(before) & np.isfinite(after)
            if known.any():
                x = np.concatenate([[0.0], np.exp(before[known])])
                y = np.concatenate([[0.0], np.exp(after[known])])
                behind = row > x[-1]
                row[:] = np.where(behind, row * (y[-1] / x[-1]), np.interp(row, x, y))
        return result


def _depths_at_target(
    run: Trajectories, target: Target, initial_loss: float, log_target: Floats
) -> Floats:
    """Return depths ``(K,)`` of the training loss at the steps ``exp(log_target)``, or NaN."""
    if target.quantity == "loss" and not target.settled:
        return np.full(len(log_target), math.log(initial_loss / target.value))
    depths = np.full(len(log_target), math.nan)
    for k in np.flatnonzero(np.isfinite(log_target)):
        good = np.isfinite(run.steps[k])
        loss = np.interp(np.exp(log_target[k]), run.steps[k][good], run.curves["loss"][k][good])
        depths[k] = math.log(initial_loss / max(loss, 1e-300))
    return depths


def _mean_over_seeds(logs: Floats) -> tuple[Floats, Floats]:
    """Return mean and SD of finite values along the first axis, the mean NaN if most are not."""
    reached = np.isfinite(logs)
    n_reached = reached.sum(axis=0)
    mean = np.where(reached, logs, 0.0).sum(axis=0) / np.maximum(n_reached, 1)
    squares = np.where(reached, (logs - mean) ** 2, 0.0).sum(axis=0)
    mean = np.where(2 * n_reached > len(logs), mean, np.nan)
    return mean, np.sqrt(squares / np.maximum(n_reached - 1, 1))
