"""Training times of thousands of configurations from a table of simulated ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.dynamics._heavy_ball import simulate_heavy_ball
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._target import Target


_MOMENTA = (0.0, 0.8, 0.95, 0.99)
_N_RATES = 9
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
    tabulated by simulation and interpolated linearly in three coordinates: ``-log(1 - m)``,
    ``log B``, and ``log(eta_e h_1)`` scaled to run from the slow regime to eight times the
    full-batch stability limit ``2 (1 + m) / (1 - m)`` of the momentum.

    Attributes:
        momenta:
            ``-log(1 - m)`` of the nodes, ascending.
        log_batches:
            ``log B`` of the nodes, ascending.
        log_tau:
            Shape (momenta, batches, rates); infinite where the target was not reached.
        curvature:
            ``h_1``.
    """

    momenta: NDArray[np.float64]
    log_batches: NDArray[np.float64]
    log_tau: NDArray[np.float64]
    curvature: float

    @classmethod
    def build(
        cls, model: LinearisedModel, target: Target, *, max_steps: int, seed: int = 0
    ) -> ResponseSurface:
        """Simulate the nodes.

        Args:
            model:
                The linearised model.
            target:
                What to reach.
            max_steps:
                Nodes that take longer count as out of reach.
            seed:
                For the order of the samples.

        Returns:
            The surface.
        """
        curvature = max(float(model.curvatures[0]), 1e-30)
        sizes = _batch_nodes(model.n_samples)
        momenta = np.array(_MOMENTA)
        m, b, u = np.meshgrid(momenta, sizes, np.linspace(0, 1, _N_RATES), indexing="ij")
        effective = _SLOW * (_fastest(m) / _SLOW) ** u / curvature

        def simulated(
            rate: NDArray[np.float64],
            size: NDArray[np.float64],
            mass: NDArray[np.float64],
            max_steps: NDArray[np.float64],
        ) -> NDArray[np.float64]:
            curves = simulate_heavy_ball(
                model,
                rate,
                size.astype(np.int64),
                mass,
                max_steps=np.ceil(max_steps).astype(np.int64),
                target=target,
                seed=seed,
            )
            return curves.first_passages(target)

        slow = np.array([_SLOW / curvature])
        still = np.zeros(1)
        slow_steps = simulated(slow, sizes[-1:], still, np.array([float(max_steps)]))
        patience = _PATIENCE * np.minimum(slow_steps, max_steps) * slow / effective
        steps = simulated(
            (effective * (1 - m)).ravel(),
            b.ravel(),
            m.ravel(),
            np.minimum(patience + 50.0 / (1 - m), max_steps).ravel(),
        ).reshape(m.shape)
        log_tau = np.log(effective * np.maximum(steps, 1.0))
        return cls(-np.log1p(-momenta), np.log(sizes), log_tau, curvature)

    def steps(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.float64],
        momentum: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return interpolated steps to the target.

        Args:
            learning_rate:
                Shape ``(K,)``.
            batch_size:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.

        Returns:
            Steps of shape ``(K,)``; infinite beyond the fastest node, and where most of the
            surrounding nodes do not reach the target.
        """
        from scipy.interpolate import RegularGridInterpolator

        effective = learning_rate / (1 - momentum)
        u = np.log(effective * self.curvature / _SLOW) / np.log(_fastest(momentum) / _SLOW)
        axes = (self.momenta, self.log_batches, np.linspace(0, 1, self.log_tau.shape[2]))
        # Beyond the ends, the outermost nodes.
        points = np.stack(
            [
                np.clip(values, nodes[0], nodes[-1])
                for values, nodes in zip(
                    (-np.log1p(-momentum), np.log(batch_size), u), axes, strict=True
                )
            ],
            axis=1,
        )
        finite = np.isfinite(self.log_tau)
        # Nodes out of reach take no part: the sum over the others, over their share.
        total = RegularGridInterpolator(axes, np.where(finite, self.log_tau, 0.0))(points)
        share = RegularGridInterpolator(axes, finite.astype(np.float64))(points)
        reached = (share > 0.5) & (u <= 1.0 + 1e-9)
        tau = np.exp(total / np.where(share > 0, share, 1.0))
        return np.where(reached, np.ceil(tau / effective), np.inf)


def _fastest(momentum: NDArray[np.float64]) -> NDArray[np.float64]:
    return _FAST * 2.0 * (1 + momentum) / (1 - momentum)


def _batch_nodes(n_samples: int) -> NDArray[np.float64]:
    """Powers of eight from eight up, and N."""
    powers = 8.0 ** np.arange(1, 9)
    return np.concatenate([powers[powers < 0.7 * n_samples], [float(n_samples)]])
