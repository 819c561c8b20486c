"""Training times of thousands of configurations from a table of simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.dynamics._heavy_ball import first_passage_time
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd import SGD
from optuna_ttp.dynamics._simulation import simulate
from optuna_ttp.dynamics._simulation import Trajectories
from optuna_ttp.dynamics._target import Target


_MOMENTA = (0.0, 0.6, 0.85, 0.95, 0.98, 0.995)
_BATCH_SIZES = (4, 8, 32)
_N_RATES = 13
# Below this change of the steepest direction a step, training time is inverse in the step.
_SLOW = 0.05
# Where the predictor gives up: the surface need not go further.
_FAST = 8.0
# Nodes that need so many times the slow regime's intrinsic time wander about and are given up.
_PATIENCE = 5.0
# And so many times the memory of the momentum, twice the time in which oscillations die down.
_SETTLING = 20.0
# Behind the target a loss goes on falling for so long, as a logarithm of the steps.
_FURTHEST = 3.0


@dataclass(frozen=True, eq=False)
class ResponseSurface:
    """Steps to one target as a function of learning rate, batch size and momentum.

    In the slow regime all configurations need the same intrinsic time ``eta_e T``, with the
    effective learning rate ``eta_e = eta / (1 - m)``; its logarithm is smooth elsewhere. It is
    tabulated by simulation and interpolated linearly in three coordinates: ``-log(1 - m)``; the
    noise scale ``gamma = (N - B) / ((N - 1) B)``, in which the steps are linear to first order;
    and ``log(eta_e h_1)`` scaled to run from the slow regime to eight times the full-batch
    stability limit ``2 (1 + m) / (1 - m)`` of the momentum.

    Attributes:
        momenta:
            ``-log(1 - m)`` of the nodes, ascending.
        noise_scales:
            ``gamma`` of the nodes, ascending from zero.
        log_tau:
            Shape (momenta, noise scales, rates); infinite where the target was not reached.
        depths:
            Loss levels on the way to the target, logarithms of the initial loss over the loss,
            ascending and ending with the target's own, shape ``(P,)``.
        log_levels:
            Logarithm of the intrinsic time ``eta_e t`` at each level, the same shape; NaN where a
            node does not get there, which may be on its way to a target that it misses.
        curvature:
            ``h_1``.
        n_samples:
            N.
        slow_tau:
            ``eta_e t`` at the target where steps are small, or at the horizon where that is
            before the target.
    """

    momenta: NDArray[np.float64]
    noise_scales: NDArray[np.float64]
    log_tau: NDArray[np.float64]
    depths: NDArray[np.float64]
    log_levels: NDArray[np.float64]
    curvature: float
    n_samples: int
    slow_tau: float

    @classmethod
    def build(
        cls,
        model: LinearisedModel,
        target: Target,
        levels: NDArray[np.float64],
        *,
        max_steps: int,
        optimizer: SGD,
        **settings: Any,
    ) -> ResponseSurface:
        """Simulate the nodes.

        Args:
            model:
                The linearised model.
            target:
                What to reach.
            levels:
                Depths on the way, ascending.
            max_steps:
                Nodes that take longer count as out of reach.
            optimizer:
                The optimiser that is simulated.
            settings:
                Those of :func:`simulate`.

        Returns:
            The surface.
        """
        curvature = max(float(model.curvatures[0]), 1e-30)
        n = model.n_samples
        sizes = np.array([n, *(b for b in reversed(_BATCH_SIZES) if b < 0.7 * n)])
        momenta = np.array(_MOMENTA)
        m, b, effective = _nodes(momenta, sizes, _N_RATES, curvature)

        def simulated(
            rate: NDArray[np.float64],
            size: NDArray[np.int64],
            mass: NDArray[np.float64],
            horizon: NDArray[np.float64],
        ) -> Trajectories:
            return simulate(
                model,
                optimizer.configurations(rate, mass),
                size,
                max_steps=np.ceil(horizon).astype(np.int64),
                target=target,
                **settings,
            )

        slow = np.array([_SLOW / curvature])
        still = np.zeros(1)
        slowest = simulated(slow, sizes[:1], still, np.array([float(max_steps)]))
        slow_steps = slowest.first_passage_times(target)
        slow_tau = float((np.minimum(slow_steps, max_steps) * slow)[0])
        curves = simulated(
            (effective * (1 - m)).ravel(),
            b.ravel(),
            m.ravel(),
            np.minimum(_patience(slow_tau, effective, m), max_steps).ravel(),
        )
        steps = curves.first_passage_times(target).reshape(m.shape)
        log_tau = np.log(effective * np.maximum(steps, 1.0))
        initial = float(model.loss(model.initial_outputs[None]))
        depths = _depths(curves, target, levels, initial)
        passages = curves.log_first_passage_times(initial * np.exp(-depths[:-1])).reshape(
            *m.shape, -1
        )
        at_target = np.where(np.isfinite(steps), log_tau - np.log(effective), np.nan)
        log_levels = np.concatenate([passages, at_target[..., None]], axis=3)
        return cls(
            -np.log1p(-momenta),
            _noise_scale(sizes, n),
            log_tau,
            depths,
            np.maximum.accumulate(log_levels + np.log(effective)[..., None], axis=3),
            curvature,
            n,
            slow_tau,
        )

    def patience(
        self, learning_rate: NDArray[np.float64], momentum: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return after how many steps configurations without a time were given up.

        Args:
            learning_rate:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.

        Returns:
            Steps, shape ``(K,)``. What may take more should be simulated.
        """
        return _patience(self.slow_tau, learning_rate / (1.0 - momentum), momentum)

    def steps(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.float64],
        momentum: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return interpolated steps to the target, and where they are extrapolated.

        Args:
            learning_rate:
                Shape ``(K,)``.
            batch_size:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.

        Returns:
            Steps of shape ``(K,)``, infinite beyond the fastest node and where most of the
            surrounding nodes do not reach the target. And whether the momentum or the noise scale
            is beyond the outermost node, or some but not all of the surrounding nodes reach the
            target.
        """
        effective, points, outside, hopeless = self._points(learning_rate, batch_size, momentum)
        # Nodes out of reach take no part: the sum over the others, over their share.
        logs, share = self._interpolated(self.log_tau[..., None], points, effective, momentum)
        logs, share = logs[:, 0], share[:, 0]
        steps = np.where((share > 0.5) & ~hopeless, np.ceil(np.exp(logs)), np.inf)
        return steps, (outside | ((share > 1e-9) & (share < 1.0 - 1e-9))) & ~hopeless

    def passages(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.float64],
        momentum: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return interpolated times at the levels, also on the way to a target that is missed.

        Args:
            learning_rate:
                Shape ``(K,)``.
            batch_size:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.

        Returns:
            Logarithms of steps at :attr:`depths`, ``(K, P)``; NaN where a level is not reached.
        """
        effective, points, _, hopeless = self._points(learning_rate, batch_size, momentum)
        logs, share = self._interpolated(self.log_levels, points, effective, momentum)
        known = (share > 0.5) & ~hopeless[:, None]
        return np.maximum.accumulate(np.where(known, logs, np.nan), axis=1)

    def depth_after(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.float64],
        momentum: NDArray[np.float64],
        steps: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return how deep the loss is after some steps.

        Args:
            learning_rate:
                Shape ``(K,)``.
            batch_size:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.
            steps:
                Shape ``(K,)``.

        Returns:
            Logarithms of the initial loss over the loss, shape ``(K,)``. Behind the target the
            loss goes on falling as fast in the logarithm of the steps; where it stays above a
            level it is at the last one that was passed.
        """
        logs = self.passages(learning_rate, batch_size, momentum)
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
        rest = np.clip(goal - logs[rows, last], 0.0, _FURTHEST)
        further = np.where(np.isfinite(slope), slope * rest, 0.0)
        # No further than the next level, of which the surface knows that it was not passed.
        further = np.where(
            last < len(depths) - 1, np.minimum(further, depths[after] - depths[last]), further
        )
        return np.asarray(np.where(np.isfinite(logs[rows, last]), depths[last] + further, 0.0))

    def retimed(
        self,
        correct: Callable[
            [
                NDArray[np.float64],
                NDArray[np.float64],
                NDArray[np.float64],
                NDArray[np.float64],
                NDArray[np.float64],
            ],
            NDArray[np.float64],
        ],
    ) -> ResponseSurface:
        """Return a surface with other times at the nodes.

        Args:
            correct:
                Maps logarithms of steps at :attr:`depths` ``(K, P)``, NaN behind a curve's end,
                learning rates, noise scales and momenta ``(K,)`` and depths ``(1, P)`` to other
                logarithms of the same shape.

        Returns:
            The surface.
        """
        shape = self.log_tau.shape
        mass, noise, effective = _nodes(
            -np.expm1(-self.momenta), self.noise_scales, shape[2], self.curvature
        )
        rate = (effective * (1 - mass)).ravel()
        logs = self.log_levels - np.log(effective)[..., None]
        new = correct(
            logs.reshape(-1, shape_p := logs.shape[3]),
            rate,
            noise.ravel(),
            mass.ravel(),
            self.depths[None, :],
        ).reshape(*shape, shape_p)
        log_levels = new + np.log(effective)[..., None]
        reached = np.isfinite(self.log_tau)
        log_tau = np.where(reached, log_levels[..., -1], np.inf)
        return replace(self, log_tau=log_tau, log_levels=log_levels)

    def _interpolated(
        self,
        table: NDArray[np.float64],
        points: NDArray[np.float64],
        effective: NDArray[np.float64],
        momentum: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logarithms of steps, and which share of the surrounding nodes has them.

        The table has intrinsic times, ``(momenta, noise scales, rates, P)``, and the results are
        of shape ``(K, P)``. Slower than the slowest nodes the way to a level tends to that without
        momentum, in proportion to the effective learning rate, and momentum lags behind by as many
        steps as at the nodes: of the time of a first level that may be nearly all.
        """
        from scipy.interpolate import RegularGridInterpolator

        known = np.isfinite(table)
        both = np.stack([np.where(known, table, 0.0), known], axis=4)
        at = RegularGridInterpolator(self._axes, both)
        totals, share = np.moveaxis(at(points), 2, 0)
        logs = totals / np.where(share > 0, share, 1.0)
        slow = _SLOW / self.curvature
        late = np.flatnonzero((effective < slow) & (momentum > 0.0))
        steps = logs - np.log(effective)[:, None]
        if not len(late):
            return steps, share
        plain, there = np.moveaxis(at(points[late] * [0.0, 1.0, 1.0]), 2, 0)
        lag = (momentum / (1.0 - momentum))[late, None]
        ahead = np.exp(logs[late]) / slow
        log_way = np.log(slow * (ahead + lag * np.expm1(-ahead / lag)))
        log_plain = np.where(there > 0, plain / np.where(there > 0, there, 1.0), log_way)
        nearness = (effective[late] / slow)[:, None]
        log_way = log_plain + nearness * (log_way - log_plain)
        one = np.ones_like(ahead)
        way = np.exp(log_way) / effective[late, None]
        steps[late] = np.log(first_passage_time(way, one, 0.0 * one, lag * one))
        return steps, share

    @property
    def _axes(self) -> tuple[NDArray[np.float64], ...]:
        return self.momenta, self.noise_scales, np.linspace(0, 1, self.log_tau.shape[2])

    def _points(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.float64],
        momentum: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Effective learning rate, points on the axes, what is outside and what hopeless."""
        effective = learning_rate / (1 - momentum)
        u = np.log(effective * self.curvature / _SLOW) / np.log(_fastest(momentum) / _SLOW)
        axes = self._axes
        wanted = (-np.log1p(-momentum), _noise_scale(batch_size, self.n_samples), u)
        # Beyond the ends, the outermost nodes.
        points = np.stack(
            [np.clip(v, nodes[0], nodes[-1]) for v, nodes in zip(wanted, axes, strict=True)],
            axis=1,
        )
        outside = np.zeros(len(effective), dtype=bool)
        for value, nodes in zip(wanted[:2], axes[:2], strict=True):
            outside |= value > nodes[-1] + 1e-9
        return effective, points, outside, u > 1.0 + 1e-9


def _depths(
    curves: Trajectories, target: Target, levels: NDArray[np.float64], initial: float
) -> NDArray[np.float64]:
    """The levels down to the target, and the target's own."""
    if target.quantity == "loss":
        deepest = float(np.log(initial / target.value))
    else:
        # As deep as most curves are where they reach the target.
        reached = np.isfinite(curves.crossings(target))
        lowest = [np.nanmin(row) for row in curves.curves["loss"][reached]]
        deepest = float(np.log(initial / np.median(lowest))) if lowest else float(levels[-1])
    return np.append(levels[levels < deepest], deepest)


def _patience(
    slow_tau: float, effective: NDArray[np.float64], momentum: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.asarray(_PATIENCE * slow_tau / effective + _SETTLING / (1.0 - momentum))


def _nodes(
    momenta: NDArray[np.float64], noises: NDArray[Any], n_rates: int, curvature: float
) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[np.float64]]:
    """Momentum, batch size or noise scale, and effective learning rate of all nodes."""
    m, b, u = np.meshgrid(momenta, noises, np.linspace(0, 1, n_rates), indexing="ij")
    return m, b, _SLOW * (_fastest(m) / _SLOW) ** u / curvature


def _fastest(momentum: NDArray[np.float64]) -> NDArray[np.float64]:
    return _FAST * 2.0 * (1 + momentum) / (1 - momentum)


def _noise_scale(
    batch_size: NDArray[np.int64] | NDArray[np.float64], n_samples: int
) -> NDArray[np.float64]:
    sizes = np.asarray(batch_size, dtype=np.float64)
    return np.asarray((n_samples - sizes) / (max(n_samples - 1, 1) * sizes))
