"""The steps of stochastic gradient descent."""

from __future__ import annotations

import torch

from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._plan import Plan
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
from optuna_ttp.dynamics._slowed_steps import SlowedSteps


class SGDUpdate:
    """The velocities of K configurations, and a step of SGD on eigen-directions or weights."""

    def __init__(
        self,
        model: LinearisedModel,
        sgd: SGDConfigurations,
        plan: Plan,
        theta: torch.Tensor,
        slowed: SlowedSteps | None = None,
    ) -> None:
        self._model, self._plan, self._slowed = model, plan, slowed
        self._velocity = torch.zeros_like(theta)
        self._count = 0
        self._now = plan.at(0)
        self._decay = plan.decay
        self._factors: torch.Tensor | None = None
        if model.weights is None:
            return
        # The gradient by a weight is that by the state over the inflation.
        self._factors = 1.0 / model.weights.inflation
        if sgd.groups is not None:
            rates = {name: group.rate for group in sgd.groups for name in group.names}
            self._factors = self._factors * model.weights.values(rates, 1.0)
            self._decay = self._decay_by_group(sgd, theta)
        if self._decay is not None:
            self._decay = self._decay * model.weights.inflation

    def _decay_by_group(self, sgd: SGDConfigurations, theta: torch.Tensor) -> torch.Tensor | None:
        """Return the weight decay of each weight, ``(K, r)``; None if all are zero."""
        assert self._model.weights is not None and sgd.groups is not None
        given = {name: g.weight_decay for g in sgd.groups for name in g.names}
        decays = {name: decay for name, decay in given.items() if decay is not None}
        of_groups = self._model.weights.values(decays, 0.0)
        grouped = self._model.weights.values(dict.fromkeys(decays, 1.0), 0.0)
        others = theta.new_tensor(sgd.weight_decay)[:, None] * (1.0 - grouped)
        decay = of_groups + others
        return decay if bool(decay.any()) else None

    def restrict(self, chosen: torch.Tensor) -> None:
        """Drop the configurations that a mask ``(K,)`` does not choose."""
        self._velocity = self._velocity[chosen]
        self._plan = self._plan.restricted(chosen)
        self._now = self._plan.at(self._count)
        if self._decay is not None:
            self._decay = self._decay[chosen]

    def step(
        self, theta: torch.Tensor, gradient: torch.Tensor, roots: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the states ``(K, r)`` after one more step with the gradient ``(K, r)``.

        ``roots`` ``(K, 1)`` are the roots of the kernel's growth, None if it has not grown.
        """
        model, plan = self._model, self._plan
        if self._decay is not None and model.pull is not None:
            moved = theta if model.decay_factors is None else model.decay_factors * theta
            gradient = gradient + self._decay * (model.pull + moved)
        if plan.changes:
            self._now = plan.at(self._count)
        now = self._now
        # The Jacobian grows like the root of the kernel: a gradient enters the velocity with the
        # root at the gradient's step, and the velocity moves the outputs with the present root.
        if roots is not None:
            gradient = roots * gradient
        # PyTorch does not dampen the first gradient.
        damped = gradient if now.gain is None or self._count == 0 else gradient * now.gain
        self._velocity = torch.addcmul(damped, now.momentum, self._velocity)
        direction = self._velocity
        if plan.looks_ahead:
            ahead = torch.addcmul(gradient, now.momentum, self._velocity)
            direction = torch.where(plan.nesterov > 0, ahead, self._velocity)
        self._count += 1
        rate = now.rate if roots is None else roots * now.rate
        if self._factors is not None:
            direction = direction * self._factors
        if self._slowed is not None:
            rate = rate * self._slowed.ratios(rate, direction)
        return torch.addcmul(theta, rate, direction, value=-1.0)
