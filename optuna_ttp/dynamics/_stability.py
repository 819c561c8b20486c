"""The largest stable learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations


# Of the table of how much of the spectrally expressible noise there is.
_MOMENTA = (0.0, 0.9)
_KNOTS = (0.03, 0.3, 0.6, 0.9, 0.99)
# Curvature-bearing directions that the noise is measured in.
_TRACE = 0.95
_MOST_DIRECTIONS = 64
_MOST_ITERATIONS = 50
_TOLERANCE = 2e-3


@dataclass(frozen=True, eq=False)
class StabilityLimit:
    """Where heavy-ball SGD stops being mean-square stable, for all batch sizes and momenta.

    Full batches are stable up to ``eta h_1 = 2 (1 + m)`` with the largest curvature ``h_1``. Of
    mini-batches, the noise must not feed itself: with the per-sample Hessians ``H_i`` a covariance
    ``P`` of the weights makes gradient noise of the covariance
    ``gamma N(P)``, ``N(P) = 1/N sum_i H_i P H_i - H P H``, with ``gamma = (N - B) / ((N - 1) B)``,
    ``1 / B`` with replacement; and heavy ball turns noise of the covariance ``M`` into weights of
    the covariance ``eta^2 G * M`` in the eigenbasis of ``H``, entry by entry, with
    :func:`_stationary_gain`. The limit is where the map ``P -> gamma eta^2 G * N(P)`` has the
    spectral radius one (Mulayoff and Michaeli, 2024, arXiv 2306.07850, here with momentum).

    With ``u = eta h_1 / (2 (1 + m))``, the share of the full-batch limit, that spectral radius is
    ``gamma (1 + m) / (1 - m) xi F(u)``, where ``F(u) = sum_k u h_k / (h_1 - u h_k)`` would be that
    of spectrally expressible noise ``N(P) = tr(H P) H`` (Velikanov, Kuznedelev and Yarotsky, 2022,
    arXiv 2206.11124), and ``xi`` is how much of it there is: a sixth to a half for networks with
    several outputs, since the noise of one output hardly reaches the others. ``xi`` depends little
    on ``u`` and ``m``; it is measured by power iteration at a few of them, in the steepest
    directions. One increasing function of one number a momentum is tabulated and inverted by
    interpolation.

    Nesterov's variant is stable up to ``eta h_1 = 2 (1 + m) / (1 + 2 m)`` on full batches; the
    limit is taken to be lower by the same factor ``1 / (1 + 2 m)`` there and at most that of
    heavy ball where noise decides.

    Dampening ``d`` is a learning rate of ``(1 - d) eta``. Weight decay ``w`` adds to every
    curvature: ``eta (h_1 + w) = 2 (1 + m)`` on full batches. On mini-batches the reciprocals of
    both limits, that without decay and that of the decay alone, are added as they are there.

    Attributes:
        largest_curvature:
            ``h_1``.
        n_samples:
            N.
        log_u:
            Nodes of the table, ascending, shape ``(P,)``.
        log_f:
            ``log(xi F)`` there, a row for momentum 0 and one for 0.9, shape ``(2, P)``.
    """

    largest_curvature: float
    n_samples: int
    log_u: NDArray[np.float64]
    log_f: NDArray[np.float64]

    @classmethod
    def of(cls, model: LinearisedModel, n_samples: int | None = None) -> StabilityLimit:
        """Tabulate the criterion.

        Args:
            model:
                The linearised model; its Hessian at the start counts.
            n_samples:
                N, where the model has only a subset of the samples. Those of the model by default.

        Returns:
            The limit.
        """
        n = model.n_samples if n_samples is None else n_samples
        largest = float(model.curvatures[0]) if len(model.curvatures) else 0.0
        if not largest > 0:
            return cls(0.0, n, np.zeros(1), np.zeros((len(_MOMENTA), 1)))
        # Dense towards u = 1, where F has its pole.
        distance = np.concatenate([np.geomspace(1e-9, 0.5, 400), np.linspace(0.5, 0.999, 200)[1:]])
        u = np.concatenate([np.geomspace(1e-9, 1e-3, 100), np.sort(1.0 - distance)[1:]])
        log_xi = np.log(_noise_shares(model))
        rows = [
            np.log(_expressible(model.curvatures, u)) + np.interp(u, _KNOTS, row) for row in log_xi
        ]
        return cls(largest, n, np.log(u), np.maximum.accumulate(rows, axis=1))

    def max_learning_rate(
        self,
        batch_size: NDArray[np.float64] | NDArray[np.int64],
        momentum: NDArray[np.float64],
        *,
        dampening: NDArray[np.float64] | float = 0.0,
        nesterov: NDArray[np.bool_] | bool = False,
        weight_decay: NDArray[np.float64] | float = 0.0,
        replacement: bool = False,
    ) -> NDArray[np.float64]:
        """Return the largest stable learning rate.

        Args:
            batch_size:
                Any shape.
            momentum:
                The same shape.
            dampening:
                Of :class:`torch.optim.SGD`, which ignores it without momentum. Zero by default.
            nesterov:
                The same shape. Heavy ball by default.
            weight_decay:
                Of :class:`torch.optim.SGD`. Zero by default.
            replacement:
                Whether batches are drawn with replacement. Off by default.

        Returns:
            Learning rates; infinity where nothing is curved.
        """
        without = self._without_decay(batch_size, momentum, nesterov, replacement)
        full = 2.0 * (1.0 + momentum) / np.where(nesterov, 1.0 + 2.0 * momentum, 1.0)
        gain = np.where(momentum > 0, 1.0 - dampening, 1.0)
        with np.errstate(divide="ignore"):
            return 1.0 / (gain * (1.0 / without + weight_decay / full))

    def headroom(
        self, sgd: SGDConfigurations, batch_size: NDArray[np.int64], *, replacement: bool = False
    ) -> NDArray[np.float64]:
        """Return the largest stable learning rates over those of K configurations.

        Args:
            sgd:
                The K configurations.
            batch_size:
                Shape ``(K,)``.
            replacement:
                Whether batches are drawn with replacement. Off by default.

        Returns:
            Shape ``(K,)``; infinite where nothing is curved.
        """
        largest = self.max_learning_rate(
            batch_size,
            sgd.momentum,
            dampening=sgd.dampening,
            nesterov=sgd.nesterov,
            weight_decay=sgd.weight_decay,
            replacement=replacement,
        )
        return np.asarray(largest / sgd.learning_rate)

    def _without_decay(
        self,
        batch_size: NDArray[np.float64] | NDArray[np.int64],
        momentum: NDArray[np.float64],
        nesterov: NDArray[np.bool_] | bool,
        replacement: bool,
    ) -> NDArray[np.float64]:
        if not self.largest_curvature > 0:
            return np.full(np.shape(batch_size), np.inf)
        n, b = self.n_samples, np.asarray(batch_size, dtype=np.float64)
        gamma = 1.0 / b if replacement else np.maximum(n - b, 0.0) / (max(n - 1, 1) * b)
        amplification = np.log((1.0 + momentum) / (1.0 - momentum))
        with np.errstate(divide="ignore"):
            wanted = -amplification - np.log(gamma)
        slow, fast = (np.interp(wanted, row, self.log_u) for row in self.log_f)
        weight = np.clip(amplification / np.log((1.0 + _MOMENTA[1]) / (1.0 - _MOMENTA[1])), 0, 1)
        u = np.exp((1.0 - weight) * slow + weight * fast)
        full = np.where(nesterov, 1.0 + 2.0 * momentum, 1.0)
        return np.where(gamma > 0, u, 1.0) * 2.0 * (1.0 + momentum) / full / self.largest_curvature


def _expressible(curvatures: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    """``F(u)`` of the class, shape ``(P,)``."""
    shares = curvatures[curvatures > 0] / curvatures[0]
    return np.array([(x * shares / (1.0 - x * shares)).sum() for x in u])


def _noise_shares(model: LinearisedModel) -> NDArray[np.float64]:
    """``xi`` of the class at the nodes, of shape (momenta, nodes)."""
    rooted = model.rooted_features(model.initial_outputs).double()
    # Per-sample Hessians are Z_i^T Z_i with the mean H.
    rooted = rooted * (model.n_samples / model.normalisers.sum().double()).sqrt()
    flat = rooted.reshape(-1, model.rank)
    h, basis = torch.linalg.eigh(flat.T @ flat / model.n_samples)
    h, basis = h.flip(0).clamp(min=0.0), basis.flip(1)
    enough = int(torch.searchsorted(h.cumsum(0), _TRACE * h.sum())) + 1
    n_kept = min(enough, _MOST_DIRECTIONS, int((h > 1e-12 * h[0]).sum()))
    rooted = rooted @ basis[:, :n_kept]
    few = _noise_radii(rooted[:, :, : (n_kept + 1) // 2], h[: (n_kept + 1) // 2])
    many = _noise_radii(rooted, h[:n_kept])
    curvatures, u = h.cpu().numpy(), np.array(_KNOTS)
    expressible = [
        _expressible(curvatures[:k], u) for k in ((n_kept + 1) // 2, n_kept, len(curvatures))
    ]
    # The directions that are left out add what the later half of the kept ones did: as much as
    # expressible noise, or nothing where each sample has directions of its own.
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.log(many / few) / np.log(expressible[1] / expressible[0])
    exponent = np.clip(np.nan_to_num(exponent, nan=0.0), 0.0, 1.0)
    shares = many / expressible[2] * (expressible[2] / expressible[1]) ** exponent
    # All samples alike make no noise: the full-batch limit holds for mini-batches.
    return np.maximum(shares, 1e-9)


def _noise_radii(rooted: torch.Tensor, h: torch.Tensor) -> NDArray[np.float64]:
    """Spectral radius over ``(1 + m) / (1 - m)`` at the nodes, of shape (momenta, nodes)."""
    radii = np.empty((len(_MOMENTA), len(_KNOTS)))
    covariance = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for row, momentum in enumerate(_MOMENTA):
        for column, u in enumerate(_KNOTS):
            rate = u * 2.0 * (1.0 + momentum) / float(h[0])
            response = rate**2 * _stationary_gain(rate * h, momentum)
            radius, covariance = _spectral_radius(rooted, h, response, covariance)
            radii[row, column] = radius * (1.0 - momentum) / (1.0 + momentum)
    return radii


def _stationary_gain(steps: torch.Tensor, momentum: float) -> torch.Tensor:
    """Covariances of heavy balls that are driven by noise, over those of the noise.

    Two modes ``x' = (1 + m - a) x - m x_- + n_a`` and ``y`` likewise with ``b``, with the noise
    covariance one, come to a stationary ``E[x y] = g``. With ``A = 1 + m - a``, ``B = 1 + m - b``:
    ``E[x' y] = (A - m B) g / (1 - m^2)`` and so
    ``1 / g = 1 - A B - m^2 + m (A (A - m B) + B (B - m A)) / (1 - m^2)``;
    ``(1 + m) / ((1 - m) a (2 (1 + m) - a))`` for ``a = b``.

    Args:
        steps:
            ``eta h_k``, shape ``(k,)``.
        momentum:
            ``m``.

    Returns:
        ``g``, of shape ``(k, k)``.
    """
    a, b = (1.0 + momentum - steps)[:, None], (1.0 + momentum - steps)[None, :]
    lagged = a * (a - momentum * b) + b * (b - momentum * a)
    return 1.0 / (1.0 - a * b - momentum**2 + momentum * lagged / (1.0 - momentum**2))


def _spectral_radius(
    rooted: torch.Tensor, h: torch.Tensor, response: torch.Tensor, start: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Power iteration with ``P -> response * N(P)``; the radius and the covariance it belongs to.

    The map takes covariances to covariances, so that its leading eigenvector is one.
    """
    radius = 0.0
    covariance = start / start.trace()
    for _ in range(_MOST_ITERATIONS):
        inner = torch.einsum("ncr,ndr->ncd", rooted @ covariance, rooted)
        noise = torch.einsum("ncr,ncs->rs", rooted, inner @ rooted) / len(rooted)
        following = response * (noise - h[:, None] * covariance * h[None, :])
        before, radius = radius, float(following.trace())
        if not radius > 0.0:
            return 0.0, start
        covariance = following / radius
        if abs(radius - before) <= _TOLERANCE * radius:
            break
    return radius, covariance
