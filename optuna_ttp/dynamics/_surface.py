"""Training times of thousands of configurations, interpolated in a table of simulated times."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from typing import ClassVar
from typing import Self

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Trajectories


@dataclass(frozen=True)
class SurfaceRules:
    """The use of a surface beyond its knots.

    Searches are those of ``benchmarks/search/results/ablation.md``.
    """

    patience: float = 5.0
    """A knot's simulation stops after this factor times the slow regime's intrinsic time. Half
    and twice of it change two and one of eight searches, none of them in length."""
    settling: float = 20.0
    """To that it adds this factor times ``1 / (1 - m)``, twice the time in which oscillations
    decay. Half and twice of it change two of eight searches, none of them in length."""
    furthest: float = 3.0
    """Logarithm of the factor on the steps over which a loss is extrapolated past the target.
    Without extrapolation four of eight searches change, and one of them takes a sixth of the
    trials; it stays, because a budget may end beyond the target."""


RULES = SurfaceRules()
# The argument of `ResponseSurface.retimed`.
Correction = Callable[[Floats, Floats, Floats, Floats, Floats], Floats]


@dataclass(frozen=True, eq=False)
class ResponseSurface(ABC):
    """Steps to one target as a function of learning rate, batch size and momentum.

    The logarithm of the intrinsic time, the steps times a learning rate, is tabulated by
    simulation and interpolated linearly in one coordinate of each.
    """

    momenta: Floats
    """``-log(1 - m)`` of the knots, ascending, a 1-D array."""
    batch_knots: Floats
    """The coordinate of the batch sizes of the knots, ascending, a 1-D array."""
    log_tau: Floats
    """Logarithm of the intrinsic time to the target, of shape (momenta, batch sizes, rates);
    infinite if a knot does not reach the target."""
    depths: Floats
    """Depths of loss levels: logarithms of the initial loss over the loss, ascending and ending
    with the depth of the target, shape ``(P,)``."""
    log_levels: Floats
    """Logarithm of the intrinsic time at each depth, of shape (momenta, batch sizes, rates, P);
    NaN if a knot does not reach it. A knot may reach depths but not the target."""
    n_samples: int
    """N, the number of samples that batches are drawn from."""
    slow_tau: float
    """Intrinsic time to the target with small steps, or at the horizon if that comes first."""
    simulates_edges: ClassVar[bool] = True
    """True if configurations between knots that reach the target and others that do not are
    extrapolated."""

    @abstractmethod
    def intrinsic_rate(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return the learning rates ``(K,)`` by which steps are multiplied to intrinsic times."""

    @abstractmethod
    def knots(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Return learning rates, noise scales, momenta and intrinsic rates of the knots, 3-D."""

    @abstractmethod
    def places(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans, Booleans]:
        """Return points on the axes, ``(K, 3)``, and masks ``(K,)``: outside, hopeless.

        Points are clipped to the outermost knots. Outside are those that have to be extrapolated,
        hopeless are those that do not reach the target.
        """

    def patience(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return the steps ``(K,)`` up to which the surface was simulated for configurations.

        Only a simulation can tell whether one of them reaches the target later.
        """
        return patience(self.slow_tau, self.intrinsic_rate(learning_rate, momentum), momentum)

    def steps(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans]:
        """Return interpolated steps to the target, and a mask of extrapolated ones, both ``(K,)``.

        Steps are infinite if most of the surrounding knots do not reach the target. They are
        extrapolated beyond the outermost knots, and, with :attr:`simulates_edges`, if some but not
        all of the surrounding knots reach the target.
        """
        points, outside, hopeless = self.places(learning_rate, batch_size, momentum)
        rate = self.intrinsic_rate(learning_rate, momentum)
        # Knots that do not reach the target are left out of the interpolation.
        logs, share = self.interpolated(self.log_tau[..., None], points, rate, momentum)
        logs, share = logs[:, 0], share[:, 0]
        steps = np.where((share > 0.5) & ~hopeless, np.ceil(np.exp(logs)), np.inf)
        if self.simulates_edges:
            outside = outside | ((share > 1e-9) & (share < 1.0 - 1e-9))
        return steps, outside & ~hopeless

    def log_first_passage_times(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> Floats:
        """Return interpolated logarithms of the steps at :attr:`depths`, ``(K, P)``.

        NaN if a depth is not reached; depths that are reached have times, also if the target is
        not reached.
        """
        points, _, hopeless = self.places(learning_rate, batch_size, momentum)
        rate = self.intrinsic_rate(learning_rate, momentum)
        logs, share = self.interpolated(self.log_levels, points, rate, momentum)
        known = (share > 0.5) & ~hopeless[:, None]
        return np.maximum.accumulate(np.where(known, logs, np.nan), axis=1)

    def depth_after(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats, steps: Floats
    ) -> Floats:
        """Return the logarithm of the initial loss over the loss after some steps, ``(K,)``.

        Past the target the loss is taken to fall at the same rate in the logarithm of the steps; a
        configuration that does not reach a depth stays at the one before. Zero if none is known.
        """
        logs = self.log_first_passage_times(learning_rate, batch_size, momentum)
        goal = np.log(np.maximum(steps, 1.0))
        # Depth zero is passed at the start, before the first level.
        logs = np.concatenate([np.minimum(logs[:, :1], 0.0) - 1.0, logs], axis=1)
        depths = np.concatenate([[0.0], self.depths])
        passed = np.logical_and.accumulate(np.nan_to_num(logs, nan=np.inf) <= goal[:, None], 1)
        last = np.maximum(passed.sum(axis=1) - 1, 0)
        rows = np.arange(len(goal))
        after = np.minimum(last + 1, len(depths) - 1)
        before = np.where(last < len(depths) - 1, last, len(depths) - 2)
        first, then = logs[rows, before], logs[rows, after]
        slope = (depths[after] - depths[before]) / np.maximum(then - first, 1e-3)
        rest = np.clip(goal - logs[rows, last], 0.0, RULES.furthest)
        further = np.where(np.isfinite(slope), slope * rest, 0.0)
        # No further than the next level, of which the surface knows that it was not passed.
        further = np.where(
            last < len(depths) - 1, np.minimum(further, depths[after] - depths[last]), further
        )
        return np.asarray(np.where(np.isfinite(logs[rows, last]), depths[last] + further, 0.0))

    def retimed(self, correct: Correction) -> Self:
        """Return a surface whose times at the knots are corrected by a function.

        ``correct`` maps logarithms of steps at :attr:`depths`, ``(K, P)``, NaN if not reached,
        learning rates, noise scales and momenta ``(K,)`` and depths ``(1, P)`` to corrected
        logarithms ``(K, P)``.
        """
        rate, noise, momentum, intrinsic = self.knots()
        shape = self.log_levels.shape
        logs = self.log_levels - np.log(intrinsic)[..., None]
        new = correct(
            logs.reshape(-1, shape[3]),
            rate.ravel(),
            noise.ravel(),
            momentum.ravel(),
            self.depths[None, :],
        ).reshape(shape)
        log_levels = new + np.log(intrinsic)[..., None]
        reached = np.isfinite(self.log_tau)
        log_tau = np.where(reached, log_levels[..., -1], np.inf)
        return replace(self, log_tau=log_tau, log_levels=log_levels)

    def interpolated(
        self, table: Floats, points: Floats, rate: Floats, momentum: Floats
    ) -> tuple[Floats, Floats]:
        """Return logarithms of steps, and the share of surrounding knots with a time, ``(K, P)``.

        ``table`` has logarithms of intrinsic times, of shape (momenta, batch sizes, rates, P), and
        ``rate`` are the intrinsic rates ``(K,)``.
        """
        logs, share = self.among_knots(table, points)
        return logs - np.log(rate)[:, None], share

    def among_knots(self, table: Floats, points: Floats) -> tuple[Floats, Floats]:
        """Return interpolated entries of a table, and the share of known knots, ``(K, P)``."""
        from scipy.interpolate import RegularGridInterpolator

        known = np.isfinite(table)
        both = np.stack([np.where(known, table, 0.0), known], axis=4)
        at = RegularGridInterpolator(self.axes, both)
        totals, share = np.moveaxis(at(points), 2, 0)
        return totals / np.where(share > 0, share, 1.0), share

    @property
    def axes(self) -> tuple[Floats, Floats, Floats]:
        """The coordinates of the knots along each axis of the table."""
        return self.momenta, self.batch_knots, np.linspace(0, 1, self.log_tau.shape[2])


def tables(
    curves: Trajectories, target: Target, levels: Floats, initial: float, rates: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return ``log_tau``, ``depths`` and ``log_levels`` of a surface from the knots' curves.

    ``rates`` are the intrinsic rates of the knots, a 3-D array; ``initial`` is the loss at first.
    """
    steps = curves.first_passage_times(target).reshape(rates.shape)
    log_tau = np.log(rates * np.maximum(steps, 1.0))
    depths = _depths(curves, target, levels, initial)
    log_times = curves.log_first_passage_times(initial * np.exp(-depths[:-1]))
    at_target = np.where(np.isfinite(steps), log_tau - np.log(rates), np.nan)
    log_levels = np.concatenate(
        [log_times.reshape(*rates.shape, -1), at_target[..., None]], axis=3
    )
    return log_tau, depths, np.maximum.accumulate(log_levels + np.log(rates)[..., None], axis=3)


def _depths(curves: Trajectories, target: Target, levels: Floats, initial: float) -> Floats:
    """Return the depths ``levels`` that come before the target, then the target's depth."""
    if target.quantity == "loss":
        deepest = float(np.log(initial / target.value))
    else:
        # The median depth of the curves that reach the target.
        reached = np.isfinite(curves.crossings(target))
        lowest = [np.nanmin(row) for row in curves.curves["loss"][reached]]
        deepest = float(np.log(initial / np.median(lowest))) if lowest else float(levels[-1])
    return np.append(levels[levels < deepest], deepest)


def patience(slow_tau: float, rate: Floats, momentum: Floats) -> Floats:
    """Return the steps after which a knot's simulation stops if the target is not reached.

    These are ``patience * slow_tau / rate + settling / (1 - momentum)`` steps; ``rate``, the
    intrinsic rates, and the result have the shape of ``momentum``.
    """
    settled = RULES.settling / (1.0 - momentum)
    return np.asarray(RULES.patience * slow_tau / rate + settled)


def noise_scale(batch_size: Integers | Floats, n_samples: int) -> Floats:
    """Return ``gamma = (N - B) / ((N - 1) B)`` of batch sizes B."""
    b = np.asarray(batch_size, dtype=np.float64)
    return np.asarray((n_samples - b) / (max(n_samples - 1, 1) * b))
