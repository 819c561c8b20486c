"""The largest stable learning rate, from the curvature and the noise of mini-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations


@dataclass(frozen=True)
class StabilityRules:
    """The accuracy of the measured mini-batch noise.

    Searches are those of ``benchmarks/search/results/ablation.md``.
    """

    momenta: tuple[float, float] = (0.0, 0.9)
    """Momenta between which the share ``xi`` of expressible noise is interpolated. The limits are
    within 4 % of those of all second moments (tests/dynamics/test_stability.py)."""
    knots: tuple[float, ...] = (0.03, 0.3, 0.6, 0.9, 0.99)
    """Shares of the full-batch limit between which ``xi`` is interpolated. Chosen with momenta."""
    trace_share: float = 0.95
    """Share of the Hessian's trace in the directions in which noise is measured. With 0.9 and 1
    searches are 1.3 and 1.25 times as long."""
    most_directions: int = 64
    """Largest number of these directions, for speed. Searches are 1.1 times as long with half of
    it, 1.02 times with twice of it."""
    most_iterations: int = 50
    """Largest number of steps of a power iteration, which ends earlier on all recorded spectra:
    with 25 and 100 their limits are the same, with ten up to 4 % different."""
    tolerance: float = 2e-3
    """Relative change of the spectral radius at which the power iteration ends. Half of it changes
    no search, twice of it two of eight, none of them in length."""


RULES = StabilityRules()


@dataclass(frozen=True, eq=False)
class StabilityLimit:
    """The largest mean-square stable learning rate of heavy-ball SGD, by batch size and momentum.

    Full batches are stable up to ``eta h_1 = 2 (1 + m)`` with the largest curvature ``h_1``. With
    mini-batches the gradient noise must not amplify itself: with the per-sample Hessians ``H_i`` a
    covariance ``P`` of the weights makes gradient noise of the covariance
    ``gamma N(P)``, ``N(P) = 1/N sum_i H_i P H_i - H P H``, with ``gamma = (N - B) / ((N - 1) B)``,
    ``1 / B`` with replacement; and heavy ball turns noise of the covariance ``M`` into weights of
    the covariance ``eta^2 G * M`` in the eigenbasis of ``H``, entry by entry, with ``G`` of
    :func:`_stationary_gain`. At the limit the map ``P -> gamma eta^2 G * N(P)`` has the spectral
    radius one (Mulayoff and Michaeli, 2024, arXiv 2306.07850, here with momentum).

    With ``u = eta h_1 / (2 (1 + m))``, the share of the full-batch limit, that spectral radius is
    ``gamma (1 + m) / (1 - m) xi F(u)``, where ``F(u) = sum_k u h_k / (h_1 - u h_k)`` would be that
    of spectrally expressible noise ``N(P) = tr(H P) H`` (Velikanov, Kuznedelev and Yarotsky, 2022,
    arXiv 2206.11124), and ``xi`` is the share of such noise: a sixth to a half for networks with
    several outputs, since the noise of one output hardly reaches the others. ``xi`` depends little
    on ``u`` and ``m``; it is measured by power iteration at a few of them, in the steepest
    directions. ``log(xi F)``, which increases with ``u``, is tabulated for two momenta and
    inverted by interpolation.

    Nesterov's variant is stable up to ``eta h_1 = 2 (1 + m) / (1 + 2 m)`` on full batches; on
    mini-batches its limit is taken to be heavy ball's times the same factor ``1 / (1 + 2 m)``.

    Dampening ``d`` is a learning rate of ``(1 - d) eta``. Weight decay ``w`` adds to every
    curvature: ``eta (h_1 + w) = 2 (1 + m)`` on full batches. That adds the reciprocals of two
    limits, without decay and of decay alone, which is done for mini-batches, too.
    """

    largest_curvature: float
    """``h_1``; zero if the loss has no curvature."""
    n_samples: int
    """N, the number of samples that batches are drawn from."""
    log_u: Floats
    """Logarithms of ``u`` in the table, ascending, shape ``(P,)``."""
    log_f: Floats
    """``log(xi F)`` at these, a row for momentum 0 and one for 0.9, shape ``(2, P)``."""
    rules: StabilityRules = RULES

    @classmethod
    def of(
        cls, model: LinearisedModel, n_samples: int | None = None, rules: StabilityRules = RULES
    ) -> StabilityLimit:
        """Return the limits that follow from the Hessian of a model at its initial outputs.

        ``n_samples`` is N if the model has only a subset of the samples.
        """
        n = model.n_samples if n_samples is None else n_samples
        largest = float(model.curvatures[0]) if len(model.curvatures) else 0.0
        if not largest > 0:
            return cls(0.0, n, np.zeros(1), np.zeros((len(rules.momenta), 1)), rules)
        # The table is dense towards u = 1, where F has its pole.
        distance = np.concatenate([np.geomspace(1e-9, 0.5, 400), np.linspace(0.5, 0.999, 200)[1:]])
        u = np.concatenate([np.geomspace(1e-9, 1e-3, 100), np.sort(1.0 - distance)[1:]])
        log_xi = np.log(_noise_shares(model, rules))
        rows = [
            np.log(_expressible(model.curvatures, u)) + np.interp(u, rules.knots, row)
            for row in log_xi
        ]
        return cls(largest, n, np.log(u), np.maximum.accumulate(rows, axis=1), rules)

    def max_learning_rate(
        self,
        batch_size: Floats | Integers,
        momentum: Floats,
        *,
        dampening: Floats | float = 0.0,
        nesterov: Booleans | bool = False,
        weight_decay: Floats | float = 0.0,
        replacement: bool = False,
    ) -> Floats:
        """Return the largest stable learning rates of configurations of :class:`torch.optim.SGD`.

        All arguments and the result have one shape; infinity if there is neither curvature nor
        weight decay. ``replacement`` says whether batches are drawn with replacement.
        """
        without = self._without_decay(batch_size, momentum, nesterov, replacement)
        full = 2.0 * (1.0 + momentum) / np.where(nesterov, 1.0 + 2.0 * momentum, 1.0)
        gain = np.where(momentum > 0, 1.0 - dampening, 1.0)
        with np.errstate(divide="ignore"):
            return 1.0 / (gain * (1.0 / without + weight_decay / full))

    def headroom(
        self, sgd: SGDConfigurations, batch_size: Integers, *, replacement: bool = False
    ) -> Floats:
        """Return :meth:`max_learning_rate` over each configuration's learning rate, ``(K,)``."""
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
        batch_size: Floats | Integers,
        momentum: Floats,
        nesterov: Booleans | bool,
        replacement: bool,
    ) -> Floats:
        """Return :meth:`max_learning_rate` without weight decay and dampening."""
        if not self.largest_curvature > 0:
            return np.full(np.shape(batch_size), np.inf)
        n, b = self.n_samples, np.asarray(batch_size, dtype=np.float64)
        gamma = 1.0 / b if replacement else np.maximum(n - b, 0.0) / (max(n - 1, 1) * b)
        amplification = np.log((1.0 + momentum) / (1.0 - momentum))
        with np.errstate(divide="ignore"):
            wanted = -amplification - np.log(gamma)
        slow, fast = (np.interp(wanted, row, self.log_u) for row in self.log_f)
        largest = self.rules.momenta[1]
        weight = np.clip(amplification / np.log((1.0 + largest) / (1.0 - largest)), 0, 1)
        u = np.exp((1.0 - weight) * slow + weight * fast)
        full = np.where(nesterov, 1.0 + 2.0 * momentum, 1.0)
        return np.where(gamma > 0, u, 1.0) * 2.0 * (1.0 + momentum) / full / self.largest_curvature


def _expressible(curvatures: Floats, u: Floats) -> Floats:
    """Return ``F(u)`` of :class:`StabilityLimit`, ``(P,)``, for descending curvatures ``(r,)``."""
    shares = curvatures[curvatures > 0] / curvatures[0]
    x = u[:, None] * shares
    return np.asarray((x / (1.0 - x)).sum(axis=1))


def _noise_shares(model: LinearisedModel, rules: StabilityRules) -> Floats:
    """Return ``xi`` of :class:`StabilityLimit` at the rules' (momenta, knots), a 2-D array."""
    rooted = model.rooted_features(model.initial_outputs).double()
    # Per-sample Hessians are Z_i^T Z_i with the mean H.
    rooted = rooted * (model.n_samples / model.normalisers.sum().double()).sqrt()
    flat = rooted.reshape(-1, model.rank)
    h, basis = torch.linalg.eigh(flat.T @ flat / model.n_samples)
    h, basis = h.flip(0).clamp(min=0.0), basis.flip(1)
    enough = int(torch.searchsorted(h.cumsum(0), rules.trace_share * h.sum())) + 1
    n_used = min(enough, rules.most_directions, int((h > 1e-12 * h[0]).sum()))
    rooted = rooted @ basis[:, :n_used]
    half = (n_used + 1) // 2
    few = _noise_radii(rooted[:, :, :half], h[:half], rules)
    many = _noise_radii(rooted, h[:n_used], rules)
    curvatures, u = h.cpu().numpy(), np.array(rules.knots)
    expressible = [_expressible(curvatures[:k], u) for k in (half, n_used, len(curvatures))]
    # The omitted directions are taken to add as much as the later half of the used directions
    # did: as much as expressible noise, or nothing if the directions of the samples are disjoint.
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.log(many / few) / np.log(expressible[1] / expressible[0])
    exponent = np.clip(np.nan_to_num(exponent, nan=0.0), 0.0, 1.0)
    shares = many / expressible[2] * (expressible[2] / expressible[1]) ** exponent
    # Identical samples make no noise: the full-batch limit holds for mini-batches.
    return np.maximum(shares, 1e-9)


def _noise_radii(rooted: torch.Tensor, h: torch.Tensor, rules: StabilityRules) -> Floats:
    """Return the spectral radii of the map ``eta^2 G * N``, divided by ``(1 + m) / (1 - m)``.

    They are returned for each momentum and knot of the rules, in the shape (momenta, knots).

    ``rooted`` are the ``Z_i`` of per-sample Hessians ``Z_i^T Z_i``, of shape ``(N, C, k)``, in
    the eigenbasis of their mean, which has the descending eigenvalues ``h``, ``(k,)``.
    """
    radii = np.empty((len(rules.momenta), len(rules.knots)))
    covariance = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for row, momentum in enumerate(rules.momenta):
        for column, u in enumerate(rules.knots):
            rate = u * 2.0 * (1.0 + momentum) / float(h[0])
            response = rate**2 * _stationary_gain(rate * h, momentum)
            radius, covariance = _spectral_radius(rooted, h, response, covariance, rules)
            radii[row, column] = radius * (1.0 - momentum) / (1.0 + momentum)
    return radii


def _stationary_gain(steps: torch.Tensor, momentum: float) -> torch.Tensor:
    """Return ``G``: stationary covariances ``(k, k)`` of heavy balls, over those of their noise.

    ``steps`` are ``eta h_k`` of the k directions, which all have the momentum ``m``.

    Two modes ``x' = (1 + m - a) x - m x_- + n_a`` and ``y`` likewise with ``b``, with the noise
    covariance one, come to a stationary ``E[x y] = g``. With ``A = 1 + m - a``, ``B = 1 + m - b``:
    ``E[x' y] = (A - m B) g / (1 - m^2)`` and so
    ``1 / g = 1 - A B - m^2 + m (A (A - m B) + B (B - m A)) / (1 - m^2)``;
    ``(1 + m) / ((1 - m) a (2 (1 + m) - a))`` for ``a = b``.
    """
    a, b = (1.0 + momentum - steps)[:, None], (1.0 + momentum - steps)[None, :]
    lagged = a * (a - momentum * b) + b * (b - momentum * a)
    return 1.0 / (1.0 - a * b - momentum**2 + momentum * lagged / (1.0 - momentum**2))


def _spectral_radius(
    rooted: torch.Tensor,
    h: torch.Tensor,
    response: torch.Tensor,
    start: torch.Tensor,
    rules: StabilityRules,
) -> tuple[float, torch.Tensor]:
    """Return the spectral radius of ``P -> response * N(P)`` and the leading ``P``, ``(k, k)``.

    The map takes covariances to covariances, so that power iteration that begins at the
    covariance ``start`` ends at a covariance. Without noise the radius is zero, and ``start`` is
    returned.
    """
    radius = 0.0
    covariance = start / start.trace()
    for _ in range(rules.most_iterations):
        inner = torch.einsum("ncr,ndr->ncd", rooted @ covariance, rooted)
        noise = torch.einsum("ncr,ncs->rs", rooted, inner @ rooted) / len(rooted)
        following = response * (noise - h[:, None] * covariance * h[None, :])
        before, radius = radius, float(following.trace())
        if not radius > 0.0:
            return 0.0, start
        covariance = following / radius
        if abs(radius - before) <= rules.tolerance * radius:
            break
    return radius, covariance
