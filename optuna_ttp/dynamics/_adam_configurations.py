"""Configurations of Adam."""

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
class AdamConfigurations:
    """K configurations of :class:`torch.optim.Adam` or, if ``decoupled``, of ``AdamW``.

    The learning rate and the momentum ``beta_1`` have the shape ``(K,)``; the other settings are
    the same for all.
    """

    learning_rate: Floats
    momentum: Floats
    beta_2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    schedule: Schedule = field(default_factory=Schedule)
    max_grad_norm: float | None = None
    accumulation_steps: int = 1
    groups: tuple[ParameterGroup, ...] | None = None

    @classmethod
    def of(
        cls,
        learning_rate: ArrayLike,
        momentum: ArrayLike = 0.9,
        *,
        beta_2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        groups: tuple[ParameterGroup, ...] | None = None,
    ) -> AdamConfigurations:
        """Return K configurations; rate and momentum are numbers or have the shape ``(K,)``."""
        rate, momenta = np.broadcast_arrays(
            np.atleast_1d(np.asarray(learning_rate, dtype=np.float64)),
            np.asarray(momentum, dtype=np.float64),
        )
        return cls(
            rate,
            momenta,
            beta_2,
            eps,
            weight_decay,
            decoupled,
            Schedule() if schedule is None else schedule,
            max_grad_norm,
            accumulation_steps,
            groups,
        )

    def __len__(self) -> int:
        return len(self.learning_rate)

    def __getitem__(self, chosen: Integers | Booleans) -> AdamConfigurations:
        rate, momentum = self.learning_rate[chosen], self.momentum[chosen]
        return replace(self, learning_rate=rate, momentum=momentum)
