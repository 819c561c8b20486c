"""Training times of thousands of configurations from a table of simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._heavy_ball import first_passage_time
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd import SGD
from optuna_ttp.dynamics._simulation import simulate
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Trajectories


@dataclass(frozen=True)
class SurfaceRules:
    """Where a surface is simulated. Not ablated where no reason is given."""

    momenta: tuple[float, ...] = (0.0, 0.6, 0.85, 0.95, 0.98, 0.995)
    """Momenta of the knots."""
    batch_sizes: tuple[int, ...] = (4, 8, 32)
    """Batch sizes of the knots, beside the full batch."""
    n_rates: int = 13
    """Number of learning rates of the knots."""
    slow: float = 0.05
    """Change of the steepest direction a step below which training time is inverse in the step."""
    fast: float = 8.0
    """Largest learning rate over the full-batch stability limit: the predictor gives up there."""
    patience: float = 5.0
    """Knots that need so many times the slow regime's intrinsic time wander about and are given
    up."""
    settling: float = 20.0
    """And so many times the memory of the momentum, twice the time in which oscillations die
    down."""
    furthest: float = 3.0
    """Behind the target a loss goes on falling for so long, as a logarithm of the steps."""


RULES = SurfaceRules()
# See `ResponseSurface.retimed`.
Correction = Callable[[Floats, Floats, Floats, Floats, Floats], Floats]


@dataclass(frozen=True, eq=False)
class ResponseSurface:
    """Steps to one target as a function of learning rate, batch size and momentum.

    In the slow regime all configurations need the same intrinsic time ``eta_e T``, with the
    effective learning rate ``eta_e = eta / (1 - m)``; its logarithm is smooth elsewhere. It is
    tabulated by simulation and interpolated linearly in three coordinates: ``-log(1 - m)``; the
    noise scale ``gamma = (N - B) / ((N - 1) B)``, in which the steps are linear to first order;
    and ``log(eta_e h_1)`` scaled to run from the slow regime to eight times the full-batch
    stability limit ``2 (1 + m) / (1 - m)`` of the momentum.
    """

    momenta: Floats
    """``-log(1 - m)`` of the knots, ascending."""
    noise_scales: Floats
    """``gamma`` of the knots, ascending from zero."""
    log_tau: Floats
    """Shape (momenta, noise scales, rates); infinite where the target was not reached."""
    depths: Floats
    """Loss levels on the way to the target, logarithms of the initial loss over the loss,
    ascending and ending with the target's own, shape ``(P,)``."""
    log_levels: Floats
    """Logarithm of the intrinsic time ``eta_e t`` at each level, the same shape; NaN where a knot
    does not get there, which may be on its way to a target that it misses."""
    curvature: float
    """``h_1``."""
    n_samples: int
    """N."""
    slow_tau: float
    """``eta_e t`` at the target where steps are small, or at the horizon where that is before the
    target."""
    rules: SurfaceRules = RULES

    @classmethod
    def build(
        cls,
        model: LinearisedModel,
        target: Target,
        levels: Floats,
        *,
        optimizer: SGD,
        max_steps: int,
        rules: SurfaceRules = RULES,
        **settings: Any,
    ) -> ResponseSurface:
        """Simulate an optimiser at the knots; the depths are the levels above the target.

        Knots that take longer than ``max_steps`` count as out of reach. The settings are those of
        :func:`simulate`.
        """
        curvature = max(float(model.curvatures[0]), 1e-30)
        n = model.n_samples
        batch_sizes = np.array([n, *(b for b in reversed(rules.batch_sizes) if b < 0.7 * n)])
        momenta = np.array(rules.momenta)
        m, b, effective = _knots(momenta, batch_sizes, rules.n_rates, curvature, rules)

        def simulated(
            rate: Floats, batch_size: Integers, momentum: Floats, horizon: Floats
        ) -> Trajectories:
            return simulate(
                model,
                optimizer.configurations(rate, momentum),
                batch_size,
                max_steps=np.ceil(horizon).astype(np.int64),
                target=target,
                **settings,
            )

        slow = np.array([rules.slow / curvature])
        still = np.zeros(1)
        slowest = simulated(slow, batch_sizes[:1], still, np.array([float(max_steps)]))
        slow_steps = slowest.first_passage_times(target)
        slow_tau = float((np.minimum(slow_steps, max_steps) * slow)[0])
        curves = simulated(
            (effective * (1 - m)).ravel(),
            b.ravel(),
            m.ravel(),
            np.minimum(_patience(slow_tau, effective, m, rules), max_steps).ravel(),
        )
        steps = curves.first_passage_times(target).reshape(m.shape)
        log_tau = np.log(effective * np.maximum(steps, 1.0))
        initial = float(model.loss(model.initial_outputs[None]))
        depths = _depths(curves, target, levels, initial)
        log_times = curves.log_first_passage_times(initial * np.exp(-depths[:-1]))
        at_target = np.where(np.isfinite(steps), log_tau - np.log(effective), np.nan)
        log_levels = np.concatenate(
            [log_times.reshape(*m.shape, -1), at_target[..., None]], axis=3
        )
        return cls(
            -np.log1p(-momenta),
            _noise_scale(batch_sizes, n),
            log_tau,
            depths,
            np.maximum.accumulate(log_levels + np.log(effective)[..., None], axis=3),
            curvature,
            n,
            slow_tau,
            rules,
        )

    def patience(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return after how many steps ``(K,)`` configurations without a time were given up.

        Configurations that may take more should be simulated.
        """
        effective = learning_rate / (1.0 - momentum)
        return _patience(self.slow_tau, effective, momentum, self.rules)

    def steps(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans]:
        """Return interpolated steps to the target, and where they are extrapolated, both ``(K,)``.

        Steps are infinite beyond the fastest knot and where most of the surrounding knots do not
        reach the target. They are extrapolated where the momentum or the noise scale is beyond the
        outermost knot, or some but not all of the surrounding knots reach the target.
        """
        effective, points, outside, hopeless = self._points(learning_rate, batch_size, momentum)
        # Knots out of reach take no part: the sum over the others, over their share.
        logs, share = self._interpolated(self.log_tau[..., None], points, effective, momentum)
        logs, share = logs[:, 0], share[:, 0]
        steps = np.where((share > 0.5) & ~hopeless, np.ceil(np.exp(logs)), np.inf)
        return steps, (outside | ((share > 1e-9) & (share < 1.0 - 1e-9))) & ~hopeless

    def log_first_passage_times(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> Floats:
        """Return interpolated logarithms of the steps at :attr:`depths`, ``(K, P)``.

        They are known also on the way to a target that is missed; NaN where a level is not
        reached.
        """
        effective, points, _, hopeless = self._points(learning_rate, batch_size, momentum)
        logs, share = self._interpolated(self.log_levels, points, effective, momentum)
        known = (share > 0.5) & ~hopeless[:, None]
        return np.maximum.accumulate(np.where(known, logs, np.nan), axis=1)

    def depth_after(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats, steps: Floats
    ) -> Floats:
        """Return the logarithm of the initial loss over the loss after some steps, ``(K,)``.

        Behind the target the loss goes on falling as fast in the logarithm of the steps; where it
        stays above a level it is at the last one that was passed.
        """
        logs = self.log_first_passage_times(learning_rate, batch_size, momentum)
        goal = np.log(np.maximum(steps, 1.0))
        # The first level is where the first step is, or before it.
        logs = np.concatenate([np.minimum(logs[:, :1], 0.0) - 1.0, logs], axis=1)
        depths = np.concatenate([[0.0], self.depths])
        passed = np.logical_and.accumulate(np.nan_to_num(logs, nan=np.inf) <= goal[:, None], 1)
        last = np.maximum(passed.sum(axis=1) - 1, 0)
        rows = np.arange(len(goal))
        after = np.minimum(last + 1, len(depths) - 1)
        before = np.where(last < len(depths) - 1, last, len(depths) - 2)
        first, then = logs[rows, before], logs[rows, after]
        slope = (depths[after] - depths[before]) / np.maximum(then - first, 1e-3)
        rest = np.clip(goal - logs[rows, last], 0.0, self.rules.furthest)
        further = np.where(np.isfinite(slope), slope * rest, 0.0)
        # No further than the next level, of which the surface knows that it was not passed.
        further = np.where(
            last < len(depths) - 1, np.minimum(further, depths[after] - depths[last]), further
        )
        return np.asarray(np.where(np.isfinite(logs[rows, last]), depths[last] + further, 0.0))

    def retimed(self, correct: Correction) -> ResponseSurface:
        """Return a surface whose knots have the times that a correction makes of theirs.

        The correction maps logarithms of steps at :attr:`depths`, ``(K, P)``, NaN behind a curve's
        end, learning rates, noise scales and momenta ``(K,)`` and depths ``(1, P)`` to other
        logarithms of the same shape.
        """
        shape = self.log_tau.shape
        momentum, noise, effective = _knots(
            -np.expm1(-self.momenta), self.noise_scales, shape[2], self.curvature, self.rules
        )
        rate = (effective * (1 - momentum)).ravel()
        logs = self.log_levels - np.log(effective)[..., None]
        new = correct(
            logs.reshape(-1, shape_p := logs.shape[3]),
            rate,
            noise.ravel(),
            momentum.ravel(),
            self.depths[None, :],
        ).reshape(*shape, shape_p)
        log_levels = new + np.log(effective)[..., None]
        reached = np.isfinite(self.log_tau)
        log_tau = np.where(reached, log_levels[..., -1], np.inf)
        return replace(self, log_tau=log_tau, log_levels=log_levels)

    def _interpolated(
        self, table: Floats, points: Floats, effective: Floats, momentum: Floats
    ) -> tuple[Floats, Floats]:
        """Return logarithms of steps, and which share of the surrounding knots has them.

        The table has intrinsic times, ``(momenta, noise scales, rates, P)``, and the results are
        of shape ``(K, P)``. Slower than the slowest knots the distance to a level tends to that
        without momentum, in proportion to the effective learning rate, and momentum lags behind by
        as many steps as at the knots: of the time of a first level that may be nearly all.
        """
        from scipy.interpolate import RegularGridInterpolator

        known = np.isfinite(table)
        both = np.stack([np.where(known, table, 0.0), known], axis=4)
        at = RegularGridInterpolator(self._axes, both)
        totals, share = np.moveaxis(at(points), 2, 0)
        logs = totals / np.where(share > 0, share, 1.0)
        slow = self.rules.slow / self.curvature
        late = np.flatnonzero((effective < slow) & (momentum > 0.0))
        steps = logs - np.log(effective)[:, None]
        if not len(late):
            return steps, share
        plain, there = np.moveaxis(at(points[late] * [0.0, 1.0, 1.0]), 2, 0)
        lag = (momentum / (1.0 - momentum))[late, None]
        ahead = np.exp(logs[late]) / slow
        log_distance = np.log(slow * (ahead + lag * np.expm1(-ahead / lag)))
        log_plain = np.where(there > 0, plain / np.where(there > 0, there, 1.0), log_distance)
        nearness = (effective[late] / slow)[:, None]
        log_distance = log_plain + nearness * (log_distance - log_plain)
        one = np.ones_like(ahead)
        distance = np.exp(log_distance) / effective[late, None]
        steps[late] = np.log(first_passage_time(distance, one, 0.0 * one, lag * one))
        return steps, share

    @property
    def _axes(self) -> tuple[Floats, ...]:
        """The coordinates of the knots along each axis of the table."""
        return self.momenta, self.noise_scales, np.linspace(0, 1, self.log_tau.shape[2])

    def _points(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Floats, Booleans, Booleans]:
        """Return effective learning rates, points on the axes, what is outside, what hopeless.

        Points of shape ``(K, 3)`` are clipped to the outermost knots; outside are momenta and
        noise scales beyond them; hopeless are learning rates above the fastest knot.
        """
        effective = learning_rate / (1 - momentum)
        slow, fast = self.rules.slow, _fastest(momentum, self.rules)
        u = np.log(effective * self.curvature / slow) / np.log(fast / slow)
        axes = self._axes
        wanted = (-np.log1p(-momentum), _noise_scale(batch_size, self.n_samples), u)
        points = np.stack(
            [np.clip(v, knots[0], knots[-1]) for v, knots in zip(wanted, axes, strict=True)],
            axis=1,
        )
        outside = np.zeros(len(effective), dtype=bool)
        for value, knots in zip(wanted[:2], axes[:2], strict=True):
            outside |= value > knots[-1] + 1e-9
        return effective, points, outside, u > 1.0 + 1e-9


def _depths(curves: Trajectories, target: Target, levels: Floats, initial: float) -> Floats:
    """Return the depths of the levels down to the target, and the target's, ascending."""
    if target.quantity == "loss":
        deepest = float(np.log(initial / target.value))
    else:
        # As deep as most curves are where they reach the target.
        reached = np.isfinite(curves.crossings(target))
        lowest = [np.nanmin(row) for row in curves.curves["loss"][reached]]
        deepest = float(np.log(initial / np.median(lowest))) if lowest else float(levels[-1])
    return np.append(levels[levels < deepest], deepest)


def _patience(slow_tau: float, effective: Floats, momentum: Floats, rules: SurfaceRules) -> Floats:
    """Return after how many steps the simulation of a knot stops if it has not reached the target.

    These are ``patience * slow_tau / effective + settling / (1 - momentum)`` steps; ``effective``,
    the effective learning rates, and the result have the shape of ``momentum``.
    """
    settled = rules.settling / (1.0 - momentum)
    return np.asarray(rules.patience * slow_tau / effective + settled)


def _knots(
    momenta: Floats, noises: NDArray[Any], n_rates: int, curvature: float, rules: SurfaceRules
) -> tuple[Floats, NDArray[Any], Floats]:
    """Return momentum, batch size or noise scale, and effective learning rate of all knots."""
    m, b, u = np.meshgrid(momenta, noises, np.linspace(0, 1, n_rates), indexing="ij")
    return m, b, rules.slow * (_fastest(m, rules) / rules.slow) ** u / curvature


def _fastest(momentum: Floats, rules: SurfaceRules) -> Floats:
    """Return the largest effective learning rate of the surface times the curvature."""
    return rules.fast * 2.0 * (1 + momentum) / (1 - momentum)


def _noise_scale(batch_size: Integers | Floats, n_samples: int) -> Floats:
    """Return ``gamma = (N - B) / ((N - 1) B)`` of batch sizes B."""
    b = np.asarray(batch_size, dtype=np.float64)
    return np.asarray((n_samples - b) / (max(n_samples - 1, 1) * b))
