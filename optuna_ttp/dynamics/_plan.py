"""The optimiser's settings at each simulated step, which may stand for several real steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._growth import KernelGrowth
from optuna_ttp.dynamics._sgd_configurations import lag
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations


@dataclass(frozen=True)
class SimulationRules:
    """The accuracy of a simulation, and when it ends.

    Searches are those of ``benchmarks/search/results/ablation.md``, predictions those of
    ``benchmarks/accuracy/results/ablation.md``.
    """

    coarse_step: float = 0.25
    """Largest relative change of the steepest direction in one coarse step, which stands for
    several steps. Times are within 2 % of exact ones (tests/dynamics/test_plan.py); half and twice
    of it change no search, and no predicted time of the recorded runs by more than 0.6 %."""
    min_coarse_steps: int = 64
    """Least number of coarse steps of a curve, and of those to its target: if there would be
    fewer, the steps are made finer. Half and twice of it change no search; chosen with the coarse
    step, for the same test."""
    blow_up: float = 100.0
    """A curve ends if its loss exceeds the initial loss by this factor. Without it one search of
    eight changes, and simulations that blow up go on to their last step."""
    edge: float = 0.8
    """Share of the stability limit up to which a kernel grows: at the limit itself oscillations
    of the loss do not decay. With 1 all searches change and take 1.56 times as long."""
    spacing: float = 1.04
    """Ratio of successive recorded steps after the first ones, which are all recorded. With 1.02
    searches are as long, with 1.08 1.33 times as long."""
    product_spacing: float = 1.15
    """The same with low-rank adapters, whose outputs for all samples take as long as several
    steps: a quarter of the time of a run of SmolLM2-135M, instead of two thirds with 1.04."""


RULES = SimulationRules()


def strides(
    curvature: float,
    sgd: SGDConfigurations,
    max_steps: Integers,
    growth: KernelGrowth | None,
    steps_per_epoch: Integers,
    rules: SimulationRules,
) -> Integers:
    """Return the number of optimiser steps, a power of two, that are simulated as one, ``(K,)``.

    If ``eta_e h_1`` is small (effective learning rate ``eta_e``, largest curvature ``h_1``),
    ``s`` steps of batch size ``B`` move the outputs like one step of batch size ``s B`` (the
    linear scaling rule: drift ``s eta_e`` and noise ``eta_e^2 s / B`` are the same). ``s`` is
    chosen so that ``s eta_e h_1`` is at most 0.25. That is coarse for the steepest direction, but
    the time to a target is mostly set by directions many times flatter; if it is not, the target
    is reached after few coarse steps, and :func:`simulate` repeats the run with finer ones. All
    arrays have the shape ``(K,)``.
    """
    effective = sgd.effective_learning_rate
    if not sgd.schedule.is_constant:
        for per_epoch in np.unique(steps_per_epoch):
            alike = np.flatnonzero(steps_per_epoch == per_epoch)
            rates = effective_rates(sgd[alike], int(per_epoch), int(max_steps[alike].max()))
            effective[alike] = rates.max(axis=1)
    if growth is not None:
        effective = effective * float(growth.factors.max())
    change = np.maximum(effective * curvature, 1e-30)
    allowed = np.minimum(rules.coarse_step / change, max_steps / rules.min_coarse_steps)
    powers: Floats = np.floor(np.log2(np.clip(allowed, 1.0, 2.0**40)))
    return (2.0**powers).astype(np.int64)


def effective_rates(sgd: SGDConfigurations, steps_per_epoch: int, n_steps: int) -> Floats:
    """Return ``eta (1 - d) / (1 - m)`` of K configurations at each of T steps, ``(K, T)``."""
    rates, momenta = sgd.schedule.values(sgd.learning_rate, sgd.momentum, steps_per_epoch, n_steps)
    gain = np.where(momenta > 0, 1.0 - sgd.dampening[:, None], 1.0)
    return rates * gain / (1.0 - momenta)


@dataclass(frozen=True, eq=False)
class Step:
    """The hyperparameters of K configurations at one step, each of shape ``(K, 1)``.

    ``gain`` is the factor on a new gradient, ``1 - d`` with dampening ``d``; None if all are one.
    """

    rate: torch.Tensor
    momentum: torch.Tensor
    gain: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The hyperparameters of K configurations at T simulated steps of ``stride`` real steps.

    ``rates``, ``momenta`` and ``gain`` (see :class:`Step`) are ``(K, T)``, or ``(K, 1)`` if they
    are constant; ``nesterov`` (1 or 0) and weight ``decay`` (None if all are zero) ``(K, 1)``.
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
        like: torch.Tensor,
        sgd: SGDConfigurations,
        per_epoch: int,
        stride: int,
        n_steps: int,
    ) -> Plan:
        """Return a plan of ``n_steps`` simulated steps; an epoch has ``per_epoch`` real steps.

        Its tensors have the data type and the device of the tensor ``like``.
        """
        n_values = 1 if sgd.schedule.is_constant else n_steps * stride
        rates, momenta = sgd.schedule.values(sgd.learning_rate, sgd.momentum, per_epoch, n_values)
        gain = np.where(momenta > 0, 1.0 - sgd.dampening[:, None], 1.0)
        nesterov = sgd.nesterov[:, None]
        if stride > 1:
            rates, momenta = _coarse_optimiser(rates, momenta, gain, nesterov, stride)
            gain, nesterov = np.ones_like(rates), np.zeros_like(nesterov)

        def tensor(values: Floats | Booleans) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(values)).to(like)

        decay = tensor(sgd.weight_decay[:, None]) if sgd.weight_decay.any() else None
        return cls(tensor(rates), tensor(momenta), tensor(gain), tensor(nesterov), decay, stride)

    @cached_property
    def changes(self) -> bool:
        """True if the learning rate or the momentum may change from step to step."""
        return self.rates.shape[1] > 1

    @cached_property
    def looks_ahead(self) -> bool:
        """True if any configuration uses Nesterov's momentum."""
        return bool((self.nesterov > 0).any())

    @cached_property
    def _dampens(self) -> bool:
        """True if any configuration dampens its gradients."""
        return bool((self.gain != 1.0).any())

    def at(self, step: int) -> Step:
        """Return the hyperparameters at a simulated step; after the last one they stay."""
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
    """Return rates and momenta of heavy balls whose one step stands for ``s = stride`` steps.

    With the lag ``l`` of the real steps they have the effective learning rate ``s eta_e`` and the
    lag ``(l - (s - 1) / 2) / s``. That makes ``s`` times the rate of contraction (see
    :attr:`SGDConfigurations.lag`) to second order, as long as this lag is not negative. Arrays
    have the shape ``(K, 1)``; with a schedule, ``(K, T s)`` becomes ``(K, T)`` by means over ``s``
    steps.
    """
    effective = rates * gain / (1.0 - momenta)
    lags = lag(momenta, nesterov)
    if rates.shape[1] > 1:
        effective, lags = (a.reshape(len(a), -1, stride).mean(axis=2) for a in (effective, lags))
    coarse_lag = np.maximum(0.0, (lags - (stride - 1.0) / 2.0) / stride)
    coarse_momentum = coarse_lag / (1.0 + coarse_lag)
    return stride * effective * (1.0 - coarse_momentum), coarse_momentum
