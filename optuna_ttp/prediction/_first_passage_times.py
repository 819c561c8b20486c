"""The times at which predicted curves pass the loss levels, down to the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories


@dataclass(frozen=True, eq=False)
class FirstPassageTimes:
    """Predicted times of K configurations at P levels, the last of which is the target.

    Attributes:
        depths:
            Logarithm of the initial training loss over that of the level, shape ``(K, P)``. Levels
            that are deeper than the target coincide with it.
        log_steps:
            Logarithm of the time in steps at each, a mean over the seeds, shape ``(K, P)``; NaN
            where it is not reached.
        log_sd:
            Standard deviation over the seeds at the target, shape ``(K,)``.
        blown_up:
            Whether the loss blew up, shape ``(K,)``.
    """

    depths: NDArray[np.float64]
    log_steps: NDArray[np.float64]
    log_sd: NDArray[np.float64]
    blown_up: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        runs: Sequence[Trajectories],
        target: Target,
        initial_loss: float,
        count: int,
        kept: NDArray[np.int64],
    ) -> FirstPassageTimes:
        """Build the times from simulations.

        Args:
            runs:
                One a seed.
            target:
                What they were simulated for.
            initial_loss:
                The training loss at the start.
            count:
                The number K of configurations.
            kept:
                Which of them were simulated. The others blow up.

        Returns:
            The first_passages. Where most seeds do not reach a level, its time is NaN.
        """
        crossings = np.array([run.crossings(target) for run in runs])
        log_target, log_sd = _mean_over_seeds(np.log(np.maximum(crossings, 1e-9)))
        levels, _ = _mean_over_seeds(
            np.array([run.log_first_passage_times(initial_loss * np.exp(-DEPTHS)) for run in runs])
        )
        deepest = np.full(len(kept), math.nan)
        if target.quantity == "loss" and not target.settled:
            deepest[:] = math.log(initial_loss / target.value)
        else:
            for k in np.flatnonzero(np.isfinite(log_target)):
                loss = np.interp(np.exp(log_target[k]), *_known(runs[0], int(k)))
                deepest[k] = math.log(initial_loss / max(loss, 1e-300))
        whole = np.full((count, len(DEPTHS) + 1), math.nan)
        depths = np.broadcast_to(np.append(DEPTHS, np.inf), whole.shape).copy()
        bound = np.where(np.isfinite(deepest), deepest, np.inf)[:, None]
        depths[kept] = np.minimum(depths[kept], bound)
        shallow = np.append(DEPTHS, np.inf)[None, :] < bound
        times = np.concatenate([levels, log_target[:, None]], axis=1)
        reached = np.isfinite(log_target)[:, None]
        # A level that the mean over the seeds puts behind the target is passed with it.
        times = np.where(shallow, times, log_target[:, None])
        times = np.where(reached, np.fmin(times, log_target[:, None]), times)
        whole[kept] = np.maximum.accumulate(times, axis=1)
        sds = np.zeros(count)
        sds[kept] = np.nan_to_num(log_sd)
        blown_up = np.ones(count, dtype=bool)
        blown_up[kept] = 2 * np.array([run.blown_up for run in runs]).sum(axis=0) > len(runs)
        return cls(depths, whole, sds, blown_up)

    @classmethod
    def interpolated(
        cls,
        depths: NDArray[np.float64],
        log_steps: NDArray[np.float64],
        blown_up: NDArray[np.bool_],
    ) -> FirstPassageTimes:
        """Build the times from a response surface.

        Args:
            depths:
                Of the surface, ending with the target's, shape ``(Q,)``.
            log_steps:
                Shape ``(K, Q)``; NaN where a level is not reached.
            blown_up:
                Shape ``(K,)``.

        Returns:
            The first_passages.
        """
        place = np.minimum(np.arange(len(DEPTHS) + 1), len(depths) - 1)
        logs = np.where(blown_up[:, None], np.nan, log_steps[:, place])
        wide = np.broadcast_to(depths[place], logs.shape)
        return cls(wide, logs, np.zeros(len(logs)), blown_up)

    def updated(self, other: FirstPassageTimes, rows: NDArray[np.int64]) -> FirstPassageTimes:
        """Return these times with some rows of others.

        Args:
            other:
                Of the same shape.
            rows:
                Which ones.

        Returns:
            The first_passages.
        """

        def merged(mine: NDArray[Any], theirs: NDArray[Any]) -> NDArray[Any]:
            mine = mine.copy()
            mine[rows] = theirs[rows]
            return mine

        return FirstPassageTimes(
            merged(self.depths, other.depths),
            merged(self.log_steps, other.log_steps),
            merged(self.log_sd, other.log_sd),
            merged(self.blown_up, other.blown_up),
        )

    @property
    def log_target(self) -> NDArray[np.float64]:
        """Logarithm of the time at the target, infinite where it is not reached, ``(K,)``."""
        last = self.log_steps[:, -1]
        return np.where(np.isfinite(last), last, np.inf)

    def on_levels(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return values at the fixed levels alone, NaN below the target.

        Args:
            values:
                Of shape ``(K, P)``.

        Returns:
            Shape ``(K, P - 1)``.
        """
        return np.where(DEPTHS[None, :] <= self.depths[:, -1:] + 1e-6, values[:, :-1], np.nan)


def warped(
    steps: NDArray[np.float64], before: NDArray[np.float64], after: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Stretch the steps of curves so that they pass their levels when they should.

    Args:
        steps:
            Of the curves, shape ``(K, T)``; NaN after a curve's end.
        before:
            Logarithms of times at the levels, shape ``(K, P)``.
        after:
            What they should be.

    Returns:
        Shape ``(K, T)``. Behind the last level a curve goes on as stretched there.
    """
    result = steps.copy()
    for row, old, new in zip(result, before, after, strict=True):
        known = np.isfinite(old) & np.isfinite(new)
        if known.any():
            x = np.concatenate([[0.0], np.exp(old[known])])
            y = np.concatenate([[0.0], np.exp(new[known])])
            behind = row > x[-1]
            row[:] = np.where(behind, row * (y[-1] / x[-1]), np.interp(row, x, y))
    return result


def _mean_over_seeds(
    logs: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation over the first axis; NaN where most are not finite."""
    reached = np.isfinite(logs)
    n_reached = reached.sum(axis=0)
    mean = np.where(reached, logs, 0.0).sum(axis=0) / np.maximum(n_reached, 1)
    squares = np.where(reached, (logs - mean) ** 2, 0.0).sum(axis=0)
    mean = np.where(2 * n_reached > len(logs), mean, np.nan)
    return mean, np.sqrt(squares / np.maximum(n_reached - 1, 1))


def _known(run: Trajectories, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    good = np.isfinite(run.steps[k])
    return run.steps[k][good], run.curves["loss"][k][good]
