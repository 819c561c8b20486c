"""Configurations of the optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._parameter_group import ParameterGroup
from optuna_ttp.dynamics._schedule import Schedule


@dataclass(frozen=True, eq=False)
class SGDConfigurations:
    """K configurations of :class:`torch.optim.SGD`: arrays of shape ``(K,)``, and a schedule."""

    learning_rate: Floats
    momentum: Floats
    dampening: Floats
    nesterov: Booleans
    weight_decay: Floats
    schedule: Schedule = field(default_factory=Schedule)
    max_grad_norm: float | None = None
    """The norm to which longer gradients are shortened, the same for all; None for no clipping."""
    accumulation_steps: int = 1
    """The mini-batches whose mean gradients are averaged for a step, the same for all."""
    groups: tuple[ParameterGroup, ...] | None = None
    """Parameters with a learning rate or weight decay of their own, which need a model of single
    weights; the same for all. None if there are none."""

    @classmethod
    def of(
        cls,
        learning_rate: ArrayLike,
        momentum: ArrayLike = 0.0,
        *,
        dampening: ArrayLike = 0.0,
        nesterov: ArrayLike = False,
        weight_decay: ArrayLike = 0.0,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        groups: tuple[ParameterGroup, ...] | None = None,
    ) -> SGDConfigurations:
        """Return K configurations; each setting is a number or has the shape ``(K,)``."""
        rate, momenta, damp, ahead, decay = np.broadcast_arrays(
            np.atleast_1d(np.asarray(learning_rate, dtype=np.float64)),
            np.asarray(momentum, dtype=np.float64),
            np.asarray(dampening, dtype=np.float64),
            np.asarray(nesterov, dtype=bool),
            np.asarray(weight_decay, dtype=np.float64),
        )
        plan = Schedule() if schedule is None else schedule
        shared = plan, max_grad_norm, accumulation_steps, groups
        return cls(rate, momenta, damp, ahead, decay, *shared)

    def __len__(self) -> int:
        return len(self.learning_rate)

    def __getitem__(self, chosen: Integers | Booleans) -> SGDConfigurations:
        return replace(
            self,
            learning_rate=self.learning_rate[chosen],
            momentum=self.momentum[chosen],
            dampening=self.dampening[chosen],
            nesterov=self.nesterov[chosen],
            weight_decay=self.weight_decay[chosen],
        )

    @property
    def effective_learning_rate(self) -> Floats:
        """``eta (1 - d) / (1 - m)`` with dampening ``d``, before any schedule; shape ``(K,)``.

        The step per unit of a constant gradient once the momentum has built up (Zancato et al.,
        NeurIPS 2020, appendix E, for ``d = 0``). PyTorch ignores dampening without momentum.
        """
        return self.learning_rate * self.gain / (1.0 - self.momentum)

    @property
    def gain(self) -> Floats:
        """The factor on a new gradient: ``1 - d``, or one without momentum; shape ``(K,)``."""
        return np.where(self.momentum > 0, 1.0 - self.dampening, 1.0)

    @property
    def lag(self) -> Floats:
        """Steps by which momentum delays a gradient: ``m / (1 - m)``, Nesterov ``m^2 / (1 - m)``.

        With curvature ``h`` and ``x = eta_e h`` both contract a direction at the rate
        ``x + (lag + 1/2) x^2 + O(x^3)`` per step: expand the slow root of
        ``z^2 - (1 + m - eta h) z + m = 0``, and of
        ``z^2 - (1 + m)(1 - eta h) z + m (1 - eta h) = 0`` for Nesterov's.
        """
        return lag(self.momentum, self.nesterov)


def lag(momentum: Floats, nesterov: Booleans) -> Floats:
    """Return :attr:`SGDConfigurations.lag` of momenta; ``nesterov`` is broadcast with them."""
    return np.where(nesterov, momentum**2, momentum) / (1.0 - momentum)
