"""What SGD does at each simulated step, and how many of its steps are simulated as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._growth import KernelGrowth
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd_configurations import lag
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations


@dataclass(frozen=True)
class SimulationRules:
    """What a simulation approximates, when it ends. Not ablated where no reason is given."""

    coarse_step: float = 0.25
    """Largest relative change of the steepest direction in one coarse step. The times are within
    2 % of exact ones (tests/dynamics/test_strides.py)."""
    min_coarse_steps: int = 64
    """A time to the target that was found in fewer coarse steps is found again in finer ones, and
    shorter curves have none. Chosen with the coarse step."""
    blow_up: float = 100.0
    """A loss so many times the initial one ends a curve."""
    edge: float = 0.8
    """Share of the edge of stability up to which a kernel grows: swings at the edge itself never
    die down."""
    spacing: float = 1.04
    """The next recorded step over the last one."""


RULES = SimulationRules()


def strides(
    model: LinearisedModel,
    sgd: SGDConfigurations,
    max_steps: Integers,
    growth: KernelGrowth | None,
    steps_per_epoch: Integers,
    rules: SimulationRules,
) -> Integers:
    """Return how many optimiser steps of K configurations are simulated as one: powers of two.

    Where ``eta_e h_1`` is small (effective learning rate ``eta_e``, largest curvature ``h_1``),
    ``s`` steps of batch size ``B`` move the outputs like one step of batch size ``s B`` (the
    linear scaling rule: drift ``s eta_e`` and noise ``eta_e^2 s / B`` are the same). ``s`` is
    chosen so that ``s eta_e h_1`` is at most 0.25. That is coarse for the steepest direction, but
    the time to a target is mostly set by directions many times flatter; where it is not, the
    target is met after few coarse steps and found again in finer ones. All arrays are of shape
    ``(K,)``.
    """
    effective = sgd.effective_learning_rate
    if not sgd.schedule.is_constant:
        for per_epoch in np.unique(steps_per_epoch):
            alike = np.flatnonzero(steps_per_epoch == per_epoch)
            rates = effective_rates(sgd[alike], int(per_epoch), int(max_steps[alike].max()))
            effective[alike] = rates.max(axis=1)
    if growth is not None:
        effective = effective * float(growth.factors.max())
    change = np.maximum(effective * float(model.curvatures[0]), 1e-30)
    allowed = np.minimum(rules.coarse_step / change, max_steps / rules.min_coarse_steps)
    powers: Floats = np.floor(np.log2(np.clip(allowed, 1.0, 2.0**40)))
    return (2.0**powers).astype(np.int64)


def effective_rates(sgd: SGDConfigurations, steps_per_epoch: int, n_steps: int) -> Floats:
    """Return the effective learning rate ``eta (1 - d) / (1 - m)`` at every step, ``(K, T)``."""
    rates, momenta = sgd.schedule.values(sgd.learning_rate, sgd.momentum, steps_per_epoch, n_steps)
    gain = np.where(momenta > 0, 1.0 - sgd.dampening[:, None], 1.0)
    return rates * gain / (1.0 - momenta)


@dataclass(frozen=True, eq=False)
class Step:
    """Learning rate, momentum and gain of a step, each ``(K, 1)``; no gain where all are one."""

    rate: torch.Tensor
    momentum: torch.Tensor
    gain: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a group of K configurations does at each of its T (coarse) steps.

    ``rates``, ``momenta`` and ``gain`` have shape ``(K, T)``, or ``(K, 1)`` where nothing changes.
    """

    rates: torch.Tensor
    momenta: torch.Tensor
    gain: torch.Tensor
    nesterov: torch.Tensor
    decay: torch.Tensor | None
    stride: int

    @classmethod
    def of(
        cls,
        model: LinearisedModel,
        sgd: SGDConfigurations,
        per_epoch: int,
        stride: int,
        n_steps: int,
    ) -> Plan:
        """Lay out ``n_steps`` steps, each of which stands for ``stride`` optimiser steps."""
        n_values = 1 if sgd.schedule.is_constant else n_steps * stride
        rates, momenta = sgd.schedule.values(sgd.learning_rate, sgd.momentum, per_epoch, n_values)
        gain = np.where(momenta > 0, 1.0 - sgd.dampening[:, None], 1.0)
        nesterov = sgd.nesterov[:, None]
        if stride > 1:
            rates, momenta = _coarse_optimiser(rates, momenta, gain, nesterov, stride)
            gain, nesterov = np.ones_like(rates), np.zeros_like(nesterov)

        def tensor(values: Floats | Booleans) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(values)).to(model.features)

        decay = tensor(sgd.weight_decay[:, None]) if sgd.weight_decay.any() else None
        return cls(tensor(rates), tensor(momenta), tensor(gain), tensor(nesterov), decay, stride)

    @cached_property
    def changes(self) -> bool:
        """Whether the learning rate or the momentum changes from step to step."""
        return self.rates.shape[1] > 1

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether any momentum is Nesterov's."""
        return bool((self.nesterov > 0).any())

    @cached_property
    def _dampens(self) -> bool:
        """Whether any gradient is dampened."""
        return bool((self.gain != 1.0).any())

    def at(self, step: int) -> Step:
        """Return what the configurations do at a step; the last one goes on for ever."""
        place = min(step, self.rates.shape[1] - 1)
        gain = self.gain[:, place, None] if self._dampens else None
        return Step(self.rates[:, place, None], self.momenta[:, place, None], gain)

    def restricted(self, chosen: torch.Tensor) -> Plan:
        """Return the plan of the configurations that a mask ``(K,)`` chooses."""
        return Plan(
            self.rates[chosen],
            self.momenta[chosen],
            self.gain[chosen],
            self.nesterov[chosen],
            None if self.decay is None else self.decay[chosen],
            self.stride,
        )


def _coarse_optimiser(
    rates: Floats, momenta: Floats, gain: Floats, nesterov: Booleans, stride: int
) -> tuple[Floats, Floats]:
    """Return learning rate and momentum of the heavy ball whose one step stands for ``s`` steps.

    It has the effective learning rate ``s eta_e`` and the lag ``(l - (s - 1) / 2) / s``, which
    makes ``s`` times the rate of contraction (see :attr:`SGDConfigurations.lag`) to second order,
    as long as this lag is not negative. Where a schedule changes them, they are means over ``s``
    steps.
    """
    effective = rates * gain / (1.0 - momenta)
    lags = lag(momenta, nesterov)
    if rates.shape[1] > 1:
        effective, lags = (a.reshape(len(a), -1, stride).mean(axis=2) for a in (effective, lags))
    coarse_lag = np.maximum(0.0, (lags - (stride - 1.0) / 2.0) / stride)
    coarse_momentum = coarse_lag / (1.0 + coarse_lag)
    return stride * effective * (1.0 - coarse_momentum), coarse_momentum
