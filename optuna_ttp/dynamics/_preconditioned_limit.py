"""The learning rate at which Adam's preconditioned curvature reaches the limit of stability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._linearised_model import LinearisedModel


@dataclass(frozen=True)
class PreconditionedLimitRules:
    """The accuracy of the preconditioned curvature. Not ablated."""

    n_batch_sizes: int = 6
    """Number of batch sizes, from one to all samples, at which the curvature is computed."""
    most_iterations: int = 40
    """Largest number of steps of a power iteration."""
    tolerance: float = 3e-3
    """Relative change of the curvature at which the power iteration ends."""


RULES = PreconditionedLimitRules()


@dataclass(frozen=True, eq=False)
class PreconditionedLimit:
    """The largest stable learning rate of Adam with its preconditioner at the start.

    With the preconditioner ``P = sqrt(E[g_b^2]) + eps`` of mini-batch gradients ``g_b`` at the
    pretrained weights, held fixed, Adam is a heavy ball with learning rate ``(1 - beta_1) eta``.
    It is stable up to ``lambda_1(P^-1 H) = (2 + 2 beta_1) / ((1 - beta_1) eta)`` with the Hessian
    ``H`` (Cohen et al., 2022, "Adaptive gradient methods at the edge of stability", arXiv
    2207.14484). Above it training need not diverge, because ``P`` adapts: so this is a scale of
    learning rates, not a prediction of failure. Since the variance of a batch's gradient falls
    with its size, the limit falls, too.
    """

    log_batch_sizes: Floats
    """Logarithms of batch sizes, ascending, shape ``(S,)``."""
    log_curvatures: Floats
    """Logarithms of ``lambda_1(P^-1 H)`` at these, shape ``(S,)``; minus infinity if the loss has
    no curvature."""

    @classmethod
    def of(
        cls,
        model: LinearisedModel,
        eps: float,
        n_samples: int | None = None,
        rules: PreconditionedLimitRules = RULES,
    ) -> PreconditionedLimit:
        """Return the limits for a model of columns at its initial outputs.

        ``n_samples`` is N if the model has only a subset of the samples.
        """
        assert model.weights is not None
        n = model.n_samples if n_samples is None else n_samples
        batch_sizes = np.unique(np.geomspace(1, n, rules.n_batch_sizes).round())
        # Both are multiplied by the inflation, which cancels against that of the features.
        mean, variance = model.gradient_moments
        rooted = model.rooted_features(model.initial_outputs).flatten(0, 1)
        curvatures = []
        start = rooted.new_ones(len(rooted))
        for batch_size in batch_sizes:
            noise = (n - batch_size) / (max(n - 1, 1) * batch_size)
            scale = (mean.square() + noise * variance).sqrt() + eps * model.weights.inflation
            inverse = model.weights.without_rest((1.0 / scale)[None])[0]
            curvature, start = _largest(model, rooted, inverse, start, rules)
            curvatures.append(curvature / float(model.normalisers.sum()))
        with np.errstate(divide="ignore"):
            return cls(np.log(batch_sizes), np.log(np.array(curvatures)))

    def max_learning_rate(self, batch_size: Floats | Integers, momentum: Floats) -> Floats:
        """Return the limits of configurations with ``beta_1 = momentum``, in their shape."""
        logs = np.interp(np.log(batch_size), self.log_batch_sizes, self.log_curvatures)
        with np.errstate(divide="ignore"):
            return (2.0 + 2.0 * momentum) / (1.0 - momentum) / np.exp(logs)


@torch.inference_mode()
def _largest(
    model: LinearisedModel,
    rooted: torch.Tensor,
    inverse: torch.Tensor,
    start: torch.Tensor,
    rules: PreconditionedLimitRules,
) -> tuple[float, torch.Tensor]:
    """Return the largest eigenvalue of ``Z diag(inverse) Z^T`` and its vector, from a start."""
    of_products, of_features = inverse.split([model.n_low_rank, rooted.shape[1]])
    vector, value = start / start.norm(), 0.0
    for _ in range(rules.most_iterations):
        following = rooted @ (of_features * (vector @ rooted))
        if model.low_rank is not None:
            following = following + model.rooted_product(of_products, vector)
        before, value = value, float(following.norm())
        if not value > 0.0:
            return 0.0, start
        vector = following / value
        if abs(value - before) <= rules.tolerance * value:
            break
    return value, vector
