"""The response surface of Adam."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import ClassVar

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._adam import Adam
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._natural_rate import natural_rate
from optuna_ttp.dynamics._plan import SimulationRules
from optuna_ttp.dynamics._simulation import simulate
from optuna_ttp.dynamics._surface import noise_scale
from optuna_ttp.dynamics._surface import ResponseSurface
from optuna_ttp.dynamics._surface import tables
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Trajectories


@dataclass(frozen=True)
class AdamSurfaceRules:
    """The knots of a surface of Adam. Not ablated yet."""

    momenta: tuple[float, ...] = (0.0, 0.8, 0.95)
    """``beta_1`` of the knots. On a digits network with 100 samples, steps of 60 configurations
    were off by 7.4 % (median; 21 % for the worst tenth); with (0, 0.9, 0.98) by 8.8 and 38 %."""
    batch_sizes: tuple[int, ...] = (4, 16, 64)
    """Batch sizes of the knots, or the full batch in place of the larger ones."""
    n_rates: int = 8
    """Number of learning rates of the knots."""
    longest: float = 200.0
    """Steps that the slowest knots would take in the intrinsic time of slow training."""
    shortest: float = 3.0
    """Steps that the fastest knots would take in that time."""
    slower: float = 10.0
    """Factor below the slowest knots to which the intrinsic time is taken to be theirs."""
    patience: float = 3.0
    """A knot that has not reached the target after this factor times the time of slow training
    is taken not to reach it."""
    settling: float = 4.0
    """To that it adds this factor times ``1 / (1 - beta_1)`` steps."""
    first: float = 100.0
    """The natural learning rate is divided by this for the run that measures slow training."""
    most_first_steps: int = 400
    """Largest number of steps of that run; if it needs more, it is repeated with four times the
    learning rate."""
    spacing: float = 1.2
    """Ratio of successive recorded steps of the knots' curves."""


RULES = AdamSurfaceRules()


@dataclass(frozen=True, eq=False)
class AdamSurface(ResponseSurface):
    """Steps of Adam to one target as a function of learning rate, batch size and ``beta_1``.

    Adam's steps have the length of the learning rate, so that slow configurations need about the
    same intrinsic time ``eta T``. Its logarithm is tabulated by simulation and interpolated
    linearly in ``-log(1 - beta_1)`` and the logarithms of the batch size and the learning rate.
    The batch size is the harmonic mean over the batches of an epoch, because the mean square of
    the gradients holds the mean of their noise: a last batch of few samples makes training slower.
    """

    rules: AdamSurfaceRules = RULES
    simulates_edges: ClassVar[bool] = False

    @classmethod
    def build(
        cls,
        model: LinearisedModel,
        target: Target,
        levels: Floats,
        *,
        optimizer: Adam,
        max_steps: int,
        rules: AdamSurfaceRules = RULES,
        **settings: Any,
    ) -> AdamSurface:
        """Return the surface of an optimiser, simulated at the knots on a model of columns.

        Its depths are the given ``levels`` above the target, and the target's. Knots that take
        longer than ``max_steps`` do not reach it. ``settings`` are arguments of :func:`simulate`.
        """
        n = model.n_samples
        # Batches of nearly equal sizes, so that the last one is not small.
        n_batches = np.maximum(1, np.rint(n / np.array(rules.batch_sizes)))
        batch_sizes = np.unique(np.ceil(n / n_batches).astype(np.int64))
        momenta = np.array(rules.momenta)
        optimizer = replace(optimizer, accumulation_steps=1)

        def simulated(
            rate: Floats, batch_size: Integers, momentum: Floats, horizon: Floats
        ) -> Trajectories:
            return simulate(
                model,
                optimizer.configurations(rate, momentum),
                batch_size,
                max_steps=np.ceil(np.minimum(horizon, max_steps)).astype(np.int64),
                target=target,
                rules=replace(SimulationRules(), spacing=rules.spacing),
                **settings,
            )

        middle = batch_sizes[[len(batch_sizes) // 2]]
        unit = natural_rate(model) / rules.first
        while True:
            first = simulated(
                np.array([unit]), middle, np.zeros(1), np.array([rules.most_first_steps])
            )
            steps = float(first.first_passage_times(target)[0])
            if np.isfinite(steps) or unit > natural_rate(model):
                break
            unit *= 4.0
        slow_tau = unit * min(steps, float(rules.most_first_steps))
        m, b, rate = _knots(momenta, batch_sizes.astype(np.float64), slow_tau, rules)
        horizon = rules.patience * slow_tau / rate + rules.settling / (1.0 - m)
        curves = simulated(rate.ravel(), b.ravel().astype(np.int64), m.ravel(), horizon.ravel())
        initial = float(model.loss(model.initial_outputs[None]))
        log_tau, depths, log_levels = tables(curves, target, levels, initial, rate)
        knots = -np.log1p(-momenta), np.log(_harmonic_mean(batch_sizes.astype(np.float64), n))
        return cls(*knots, log_tau, depths, log_levels, n, slow_tau, rules)

    def intrinsic_rate(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return the learning rates, ``(K,)``."""
        del momentum
        return learning_rate

    def knots(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Return learning rates, noise scales, momenta and intrinsic rates of the knots, 3-D."""
        momentum, batch_size, rate = _knots(
            -np.expm1(-self.momenta), np.exp(self.batch_knots), self.slow_tau, self.rules
        )
        return rate, noise_scale(batch_size, self.n_samples), momentum, rate

    def places(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans, Booleans]:
        """Return points on the axes, ``(K, 3)``, and masks ``(K,)``: outside, hopeless.

        Outside is what lies beyond the outermost knots, with a margin for slow learning rates.
        Hopeless are learning rates above those of the fastest knots if these do not reach it.
        """
        span = np.log(self.rules.longest / self.rules.shortest)
        u = np.log(learning_rate * self.rules.longest / self.slow_tau) / span
        effective = _harmonic_mean(batch_size, self.n_samples)
        wanted = (-np.log1p(-momentum), np.log(effective), u)
        points = np.stack(
            [np.clip(v, k[0], k[-1]) for v, k in zip(wanted, self.axes, strict=True)], axis=1
        )
        _, share = self.among_knots(self.log_tau[..., None], points)
        fast = u > 1.0 + 1e-9
        hopeless = fast & ~(share[:, 0] > 0.5)
        outside = fast | (u < -np.log(self.rules.slower) / span)
        outside |= wanted[0] > self.momenta[-1] + 1e-9
        outside |= np.abs(wanted[1] - points[:, 1]) > 1e-9
        return points, outside, hopeless

    def patience(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return infinity, ``(K,)``: what has not reached the target in time never does."""
        return np.full(np.broadcast_shapes(learning_rate.shape, momentum.shape), np.inf)


def _harmonic_mean(batch_size: Floats, n_samples: int) -> Floats:
    """Return the harmonic mean of the batches' sizes in an epoch of N samples, ``(K,)``."""
    n_whole = n_samples // batch_size
    rest = n_samples - n_whole * batch_size
    last = (rest > 0).astype(np.float64)
    inverse = n_whole / batch_size + last / np.maximum(rest, 1.0)
    return np.asarray((n_whole + last) / inverse)


def _knots(
    momenta: Floats, batch_sizes: Floats, slow_tau: float, rules: AdamSurfaceRules
) -> tuple[Floats, Floats, Floats]:
    """Return momenta, batch sizes and learning rates of the grid of knots, 3-D arrays."""
    rates = slow_tau / np.geomspace(rules.longest, rules.shortest, rules.n_rates)
    m, b, rate = np.meshgrid(momenta, batch_sizes, rates, indexing="ij")
    return m, b, rate
