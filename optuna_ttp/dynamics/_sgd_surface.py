"""The response surface of SGD."""

from __future__ import annotations

from dataclasses import dataclass
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
from optuna_ttp.dynamics._surface import noise_scale
from optuna_ttp.dynamics._surface import patience
from optuna_ttp.dynamics._surface import ResponseSurface
from optuna_ttp.dynamics._surface import tables
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Trajectories


@dataclass(frozen=True)
class SGDSurfaceRules:
    """The knots of a surface of SGD.

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


RULES = SGDSurfaceRules()


@dataclass(frozen=True, eq=False)
class SGDSurface(ResponseSurface):
    """Steps of SGD to one target as a function of learning rate, batch size and momentum.

    In the slow regime all configurations need the same intrinsic time ``eta_e T``, with the
    effective learning rate ``eta_e = eta / (1 - m)``; elsewhere its logarithm is smooth. It is
    tabulated by simulation and interpolated linearly in three coordinates: ``-log(1 - m)``; the
    noise scale ``gamma = (N - B) / ((N - 1) B)``, in which the steps are linear to first order;
    and ``log(eta_e h_1)`` scaled to run from the slow regime to eight times the full-batch
    stability limit ``2 (1 + m) / (1 - m)`` of the momentum.
    """

    curvature: float
    """``h_1``, the largest curvature."""
    rules: SGDSurfaceRules = RULES

    @classmethod
    def build(
        cls,
        model: LinearisedModel,
        target: Target,
        levels: Floats,
        *,
        optimizer: SGD,
        max_steps: int,
        rules: SGDSurfaceRules = RULES,
        **settings: Any,
    ) -> SGDSurface:
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
            np.minimum(patience(slow_tau, effective, m), max_steps).ravel(),
        )
        initial = float(model.loss(model.initial_outputs[None]))
        log_tau, depths, log_levels = tables(curves, target, levels, initial, effective)
        return cls(
            -np.log1p(-momenta),
            noise_scale(batch_sizes, n),
            log_tau,
            depths,
            log_levels,
            n,
            slow_tau,
            curvature,
            rules,
        )

    def intrinsic_rate(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return the effective learning rates ``eta / (1 - m)``, ``(K,)``."""
        return learning_rate / (1.0 - momentum)

    def knots(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Return learning rates, noise scales, momenta and intrinsic rates of the knots, 3-D."""
        momentum, noise, effective = _knots(
            -np.expm1(-self.momenta),
            self.batch_knots,
            self.log_tau.shape[2],
            self.curvature,
            self.rules,
        )
        return effective * (1 - momentum), noise, momentum, effective

    def interpolated(
        self, table: Floats, points: Floats, rate: Floats, momentum: Floats
    ) -> tuple[Floats, Floats]:
        """Return logarithms of steps, and the share of surrounding knots with a time, ``(K, P)``.

        Below the slowest knots' learning rate the intrinsic time without the delay by momentum
        tends to that of momentum zero, in proportion to the effective learning rate, and momentum
        delays by as many steps as at the knots, which may be most of the time to a first level.
        """
        logs, share = self.among_knots(table, points)
        slow = self.rules.slow / self.curvature
        late = np.flatnonzero((rate < slow) & (momentum > 0.0))
        steps = logs - np.log(rate)[:, None]
        if not len(late):
            return steps, share
        plain, there = self.among_knots(table, points[late] * [0.0, 1.0, 1.0])
        lag = (momentum / (1.0 - momentum))[late, None]
        ahead = np.exp(logs[late]) / slow
        log_distance = np.log(slow * (ahead + lag * np.expm1(-ahead / lag)))
        log_plain = np.where(there > 0, plain, log_distance)
        nearness = (rate[late] / slow)[:, None]
        log_distance = log_plain + nearness * (log_distance - log_plain)
        one = np.ones_like(ahead)
        distance = np.exp(log_distance) / rate[late, None]
        steps[late] = np.log(first_passage_time(distance, one, 0.0 * one, lag * one))
        return steps, share

    def places(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans, Booleans]:
        """Return points on the axes, ``(K, 3)``, and masks ``(K,)``: outside, hopeless.

        Outside is a momentum or a noise scale beyond the outermost knots, hopeless a learning rate
        above the fastest knot.
        """
        effective = learning_rate / (1 - momentum)
        slow, fast = self.rules.slow, _fastest(momentum, self.rules)
        u = np.log(effective * self.curvature / slow) / np.log(fast / slow)
        axes = self.axes
        wanted = (-np.log1p(-momentum), noise_scale(batch_size, self.n_samples), u)
        points = np.stack(
            [np.clip(v, knots[0], knots[-1]) for v, knots in zip(wanted, axes, strict=True)],
            axis=1,
        )
        hopeless = u > 1.0 + 1e-9
        outside = np.zeros(len(effective), dtype=bool)
        for value, knots in zip(wanted[:2], axes[:2], strict=True):
            outside |= value > knots[-1] + 1e-9
        return points, outside, hopeless


def _knots(
    momenta: Floats,
    noises: NDArray[Any],
    n_rates: int,
    curvature: float,
    rules: SGDSurfaceRules,
) -> tuple[Floats, NDArray[Any], Floats]:
    """Return momenta, noises and effective learning rates of the grid of knots, 3-D arrays."""
    m, b, u = np.meshgrid(momenta, noises, np.linspace(0, 1, n_rates), indexing="ij")
    return m, b, rules.slow * (_fastest(m, rules) / rules.slow) ** u / curvature


def _fastest(momentum: Floats, rules: SGDSurfaceRules) -> Floats:
    """Return the largest effective learning rate of the knots times ``h_1``, by momentum."""
    return rules.fast * 2.0 * (1 + momentum) / (1 - momentum)
