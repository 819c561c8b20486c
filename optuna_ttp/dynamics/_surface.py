"""Training times of thousands of configurations, interpolated in a table of simulated times."""

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
    """The knots of a surface and their simulations.

    Searches are those of ``benchmarks/search/results/ablation.md``. Momenta and batch sizes were
    not measured one by one.
    """

    momenta: tuple[float, ...] = (0.0, 0.6, 0.85, 0.95, 0.98, 0.995)
    """Momenta of the knots."""
    batch_sizes: tuple[int, ...] = (4, 8, 32)
    """Batch sizes of the knots, beside the full batch."""
    n_rates: int = 13
    """Number of learning rates of the knots. With half and twice of it searches are 1.4 and 1.3
    times as long."""
    slow: float = 0.05
    """Change of the steepest direction per step below which the training time is inversely
    proportional to the learning rate (the slow regime). With half and twice of it searches are
    1.1 times as long."""
    fast: float = 8.0
    """Largest learning rate over the full-batch stability limit: above it, training diverges.
    With half and twice of it searches are 1.2 and 1.4 times as long."""
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
class ResponseSurface:
    """Steps to one target as a function of learning rate, batch size and momentum.

    In the slow regime all configurations need the same intrinsic time ``eta_e T``, with the
    effective learning rate ``eta_e = eta / (1 - m)``; elsewhere its logarithm is smooth. It is
    tabulated by simulation and interpolated linearly in three coordinates: ``-log(1 - m)``; the
    noise scale ``gamma = (N - B) / ((N - 1) B)``, in which the steps are linear to first order;
    and ``log(eta_e h_1)`` scaled to run from the slow regime to eight times the full-batch
    stability limit ``2 (1 + m) / (1 - m)`` of the momentum.
    """

    momenta: Floats
    """``-log(1 - m)`` of the knots, ascending, a 1-D array."""
    noise_scales: Floats
    """``gamma`` of the knots, ascending from zero, a 1-D array."""
    log_tau: Floats
    """Logarithm of the intrinsic time ``eta_e T`` to the target, of shape (momenta, noise scales,
    rates); infinite if a knot does not reach the target."""
    depths: Floats
    """Depths of loss levels: logarithms of the initial loss over the loss, ascending and ending
    with the depth of the target, shape ``(P,)``."""
    log_levels: Floats
    """Logarithm of the intrinsic time at each depth, of shape (momenta, noise scales, rates, P);
    NaN if a knot does not reach it. A knot may reach depths but not the target."""
    curvature: float
    """``h_1``, the largest curvature."""
    n_samples: int
    """N, the number of samples that batches are drawn from."""
    slow_tau: float
    """Intrinsic time to the target with small steps, or at the horizon if that comes first."""
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
        """Return the surface of an optimiser, simulated at the knots.

        Its depths are the given ``levels`` above the target, and the target's. Knots that take
        longer than ``max_steps`` do not reach it. ``settings`` are arguments of :func:`simulate`.
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
        """Return the steps ``(K,)`` up to which the surface was simulated for configurations.

        Only a simulation can tell whether one of them reaches the target later.
        """
        effective = learning_rate / (1.0 - momentum)
        return _patience(self.slow_tau, effective, momentum, self.rules)

    def steps(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans]:
        """Return interpolated steps to the target, and a mask of extrapolated ones, both ``(K,)``.

        Steps are infinite beyond the fastest knot and if most of the surrounding knots do not
        reach the target. They are extrapolated if the momentum or the noise scale is beyond the
        outermost knot, or some but not all of the surrounding knots reach the target.
        """
        effective, points, outside, hopeless = self._points(learning_rate, batch_size, momentum)
        # Knots that do not reach the target are left out of the interpolation.
        logs, share = self._interpolated(self.log_tau[..., None], points, effective, momentum)
        logs, share = logs[:, 0], share[:, 0]
        steps = np.where((share > 0.5) & ~hopeless, np.ceil(np.exp(logs)), np.inf)
        return steps, (outside | ((share > 1e-9) & (share < 1.0 - 1e-9))) & ~hopeless

    def log_first_passage_times(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> Floats:
        """Return interpolated logarithms of the steps at :attr:`depths`, ``(K, P)``.

        NaN if a depth is not reached; depths that are reached have times, also if the target is
        not reached.
        """
        effective, points, _, hopeless = self._points(learning_rate, batch_size, momentum)
        logs, share = self._interpolated(self.log_levels, points, effective, momentum)
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
        rest = np.clip(goal - logs[rows, last], 0.0, self.rules.furthest)
        further = np.where(np.isfinite(slope), slope * rest, 0.0)
        # No further than the next level, of which the surface knows that it was not passed.
        further = np.where(
            last < len(depths) - 1, np.minimum(further, depths[after] - depths[last]), further
        )
        return np.asarray(np.where(np.isfinite(logs[rows, last]), depths[last] + further, 0.0))

    def retimed(self, correct: Correction) -> ResponseSurface:
        """Return a surface whose times at the knots are corrected by a function.

        ``correct`` maps logarithms of steps at :attr:`depths`, ``(K, P)``, NaN if not reached,
        learning rates, noise scales and momenta ``(K,)`` and depths ``(1, P)`` to corrected
        logarithms ``(K, P)``.
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
        """Return logarithms of steps, and the share of surrounding knots with a time, ``(K, P)``.

        ``table`` has logarithms of intrinsic times, of shape (momenta, noise scales, rates, P).
        Below the slowest knots' learning rate the intrinsic time without the delay by momentum
        tends to that of momentum zero, in proportion to the effective learning rate, and momentum
        delays by as many steps as at the knots, which may be most of the time to a first level.
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
        """Return effective learning rates, points on the axes, and masks: outside, hopeless.

        Points, ``(K, 3)``, are clipped to the outermost knots. The masks ``(K,)`` are true for a
        momentum or noise scale beyond these, and for a learning rate above the fastest knot.
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
    """Return the depths ``levels`` that come before the target, then the target's depth."""
    if target.quantity == "loss":
        deepest = float(np.log(initial / target.value))
    else:
        # The median depth of the curves that reach the target.
        reached = np.isfinite(curves.crossings(target))
        lowest = [np.nanmin(row) for row in curves.curves["loss"][reached]]
        deepest = float(np.log(initial / np.median(lowest))) if lowest else float(levels[-1])
    return np.append(levels[levels < deepest], deepest)


def _patience(slow_tau: float, effective: Floats, momentum: Floats, rules: SurfaceRules) -> Floats:
    """Return the steps after which a knot's simulation stops if the target is not reached.

    These are ``patience * slow_tau / effective + settling / (1 - momentum)`` steps; ``effective``,
    the effective learning rates, and the result have the shape of ``momentum``.
    """
    settled = rules.settling / (1.0 - momentum)
    return np.asarray(rules.patience * slow_tau / effective + settled)


def _knots(
    momenta: Floats, noises: NDArray[Any], n_rates: int, curvature: float, rules: SurfaceRules
) -> tuple[Floats, NDArray[Any], Floats]:
    """Return momenta, noises and effective learning rates of the grid of knots, 3-D arrays."""
    m, b, u = np.meshgrid(momenta, noises, np.linspace(0, 1, n_rates), indexing="ij")
    return m, b, rules.slow * (_fastest(m, rules) / rules.slow) ** u / curvature


def _fastest(momentum: Floats, rules: SurfaceRules) -> Floats:
    """Return the largest effective learning rate of the knots times ``h_1``, by momentum."""
    return rules.fast * 2.0 * (1 + momentum) / (1 - momentum)


def _noise_scale(batch_size: Integers | Floats, n_samples: int) -> Floats:
    """Return ``gamma = (N - B) / ((N - 1) B)`` of batch sizes B."""
    b = np.asarray(batch_size, dtype=np.float64)
    return np.asarray((n_samples - b) / (max(n_samples - 1, 1) * b))
