"""The steps of Adam on single weights."""

from __future__ import annotations

import numpy as np
import torch

from optuna_ttp._util.arrays import Floats
from optuna_ttp.dynamics._adam_configurations import AdamConfigurations
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._saturation import Saturation


class AdamUpdate:
    """Adam's state for K configurations, and its step on the changes of single weights.

    Gradients arrive multiplied by the inflation ``u`` (:class:`SingleWeights`). So ``m`` is ``u``
    times and ``v`` is ``u^2`` times that of PyTorch, and with ``u eps`` in place of ``eps`` the
    step is the same. All is done in place, since memory bounds the speed.
    """

    def __init__(
        self,
        model: LinearisedModel,
        adam: AdamConfigurations,
        theta: torch.Tensor,
        *,
        steps_per_epoch: int,
        n_steps: int,
        batch_size: int,
        saturation: Saturation | None,
    ) -> None:
        assert model.weights is not None and model.pull is not None
        self._weights, self._pull = model.weights, model.pull
        self._beta_2, self._decoupled = adam.beta_2, adam.decoupled
        n_values = 1 if adam.schedule.is_constant else n_steps
        self._rates, self._momenta = adam.schedule.values(
            adam.learning_rate, adam.momentum, steps_per_epoch, n_values
        )
        self._moves = self._rates
        if saturation is not None:
            self._moves = self._rates * saturation.at(self._rates, batch_size)
        self._eps = adam.eps * model.weights.inflation
        self._factors: torch.Tensor | None = None
        self._decay: torch.Tensor | float = adam.weight_decay
        if adam.groups is not None:
            rates = {name: group.rate for group in adam.groups for name in group.names}
            if set(rates.values()) != {1.0}:
                self._factors = model.weights.values(rates, 1.0)
            decays = {
                name: group.weight_decay
                for group in adam.groups
                if group.weight_decay is not None
                for name in group.names
            }
            self._decay = model.weights.values(decays, adam.weight_decay)
        self._decays = bool(torch.as_tensor(self._decay).any())
        self._first = torch.zeros_like(theta)
        self._second = torch.zeros_like(theta)
        self._scratch = torch.empty_like(theta)
        self._count = 0

    def restrict(self, chosen: torch.Tensor) -> None:
        """Drop the configurations that a mask ``(K,)`` does not choose."""
        self._first, self._second = self._first[chosen], self._second[chosen]
        self._scratch = torch.empty_like(self._first)
        mask = chosen.cpu().numpy()
        self._rates, self._moves, self._momenta = (
            a[mask] for a in (self._rates, self._moves, self._momenta)
        )

    def step(
        self, theta: torch.Tensor, gradient: torch.Tensor, roots: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the changes ``(K, r)`` after one more step; both arguments are overwritten.

        ``roots`` ``(K, 1)`` are the roots of the kernel's growth: the gradient enters with them,
        and the step moves the outputs with them. None if the kernel has not grown.
        """
        place = min(self._count, self._rates.shape[1] - 1)
        self._count += 1
        rate, move, momentum = (
            a[:, place, None] for a in (self._rates, self._moves, self._momenta)
        )
        bias_1 = 1.0 - momentum**self._count
        bias_2 = (1.0 - self._beta_2**self._count) ** 0.5
        if roots is not None:
            gradient.mul_(roots)
        self._decay_weights(theta, gradient, rate)
        self._first.lerp_(gradient, self._column(1.0 - momentum, theta))
        self._second.mul_(self._beta_2).addcmul_(gradient, gradient, value=1.0 - self._beta_2)
        denominator = torch.sqrt(self._second, out=self._scratch)
        denominator.add_(self._eps, alpha=bias_2)
        with np.errstate(divide="ignore"):
            # The step is minus the rate times (m / bias_1) / (sqrt(v) / bias_2 + eps).
            factor = self._column(bias_1 / (bias_2 * move), theta)
        denominator.mul_(factor if roots is None else factor / roots)
        if self._factors is not None:
            denominator.div_(self._factors)
        return theta.addcdiv_(self._first, denominator, value=-1.0)

    def _decay_weights(self, theta: torch.Tensor, gradient: torch.Tensor, rate: Floats) -> None:
        """Decay the weights or, if decay is not decoupled, add it to the gradient, in place."""
        if not self._decays:
            return
        if not self._decoupled:
            gradient.add_((self._pull + theta) * (self._decay * self._weights.inflation))
            self._weights.without_rest(gradient)
            return
        shrinkage = self._column(rate, theta) * self._decay
        if self._factors is not None:
            shrinkage = shrinkage * self._factors
        # The weights are pull + theta.
        theta.mul_(1.0 - shrinkage).addcmul_(shrinkage, self._pull, value=-1.0)

    @staticmethod
    def _column(values: Floats, like: torch.Tensor) -> torch.Tensor:
        """Return values ``(K, 1)`` as a tensor."""
        return torch.as_tensor(values).to(like)
