"""Training times of thousands of configurations from a table of simulated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd import SGD
from optuna_ttp.dynamics._simulation import simulate
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
        curvature:
            ``h_1``.
        n_samples:
            N.
    """

    momenta: NDArray[np.float64]
    noise_scales: NDArray[np.float64]
    log_tau: NDArray[np.float64]
    curvature: float
    n_samples: int

    @classmethod
    def build(
        cls, model: LinearisedModel, target: Target, *, max_steps: int, **settings: Any
    ) -> ResponseSurface:
        """Simulate the nodes.

        Args:
            model:
                The linearised model.
            target:
                What to reach.
            max_steps:
                Nodes that take longer count as out of reach.
            settings:
                ``dampening``, ``nesterov`` and ``weight_decay`` of :meth:`SGD.of`; all others are
                those of :func:`simulate`.

        Returns:
            The surface.
        """
        curvature = max(float(model.curvatures[0]), 1e-30)
        of_sgd = {k: settings.pop(k) for k in _OF_SGD if k in settings}
        n = model.n_samples
        sizes = np.array([n, *(b for b in reversed(_BATCH_SIZES) if b < 0.7 * n)])
        momenta = np.array(_MOMENTA)
        m, b, u = np.meshgrid(momenta, sizes, np.linspace(0, 1, _N_RATES), indexing="ij")
        effective = _SLOW * (_fastest(m) / _SLOW) ** u / curvature

        def simulated(
            rate: NDArray[np.float64],
            size: NDArray[np.int64],
            mass: NDArray[np.float64],
            horizon: NDArray[np.float64],
        ) -> NDArray[np.float64]:
            curves = simulate(
                model,
                SGD.of(rate, mass, **of_sgd),
                size,
                max_steps=np.ceil(horizon).astype(np.int64),
                target=target,
                **settings,
            )
            return curves.first_passages(target)

        slow = np.array([_SLOW / curvature])
        still = np.zeros(1)
        slow_steps = simulated(slow, sizes[:1], still, np.array([float(max_steps)]))
        patience = _PATIENCE * np.minimum(slow_steps, max_steps) * slow / effective
        steps = simulated(
            (effective * (1 - m)).ravel(),
            b.ravel(),
            m.ravel(),
            np.minimum(patience + 50.0 / (1 - m), max_steps).ravel(),
        ).reshape(m.shape)
        log_tau = np.log(effective * np.maximum(steps, 1.0))
        return cls(-np.log1p(-momenta), _noise_scale(sizes, n), log_tau, curvature, n)

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
        from scipy.interpolate import RegularGridInterpolator

        effective = learning_rate / (1 - momentum)
        u = np.log(effective * self.curvature / _SLOW) / np.log(_fastest(momentum) / _SLOW)
        axes = (self.momenta, self.noise_scales, np.linspace(0, 1, self.log_tau.shape[2]))
        wanted = (-np.log1p(-momentum), _noise_scale(batch_size, self.n_samples), u)
        # Beyond the ends, the outermost nodes.
        points = np.stack(
            [np.clip(v, nodes[0], nodes[-1]) for v, nodes in zip(wanted, axes, strict=True)],
            axis=1,
        )
        finite = np.isfinite(self.log_tau)
        # Nodes out of reach take no part: the sum over the others, over their share.
        table = np.stack([np.where(finite, self.log_tau, 0.0), finite], axis=3)
        total, share = RegularGridInterpolator(axes, table)(points).T
        tau = np.exp(total / np.where(share > 0, share, 1.0))
        hopeless = u > 1.0 + 1e-9
        steps = np.where((share > 0.5) & ~hopeless, np.ceil(tau / effective), np.inf)
        outside = np.zeros(len(steps), dtype=bool)
        for value, nodes in zip(wanted[:2], axes[:2], strict=True):
            outside |= value > nodes[-1] + 1e-9
        return steps, (outside | ((share > 1e-9) & (share < 1.0 - 1e-9))) & ~hopeless


_OF_SGD = ("dampening", "nesterov", "weight_decay")


def _fastest(momentum: NDArray[np.float64]) -> NDArray[np.float64]:
    return _FAST * 2.0 * (1 + momentum) / (1 - momentum)


def _noise_scale(
    batch_size: NDArray[np.int64] | NDArray[np.float64], n_samples: int
) -> NDArray[np.float64]:
    sizes = np.asarray(batch_size, dtype=np.float64)
    return np.asarray((n_samples - sizes) / (max(n_samples - 1, 1) * sizes))
