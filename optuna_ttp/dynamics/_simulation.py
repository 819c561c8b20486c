"""Mini-batch SGD on the linearised model, simulated step by step.

Nothing about the optimiser is approximated where the stride is one: the update of
:class:`torch.optim.SGD` with momentum, dampening, Nesterov's variant, L2 weight decay and a
schedule, on batches as a data loader draws them. Only linearisation and truncation remain as
errors. Configurations with the same batch size advance together and see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics._growth import KernelGrowth
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sgd_configurations import lag
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
from optuna_ttp.dynamics._smoothing import Smoothing
from optuna_ttp.dynamics._stability import StabilityLimit
from optuna_ttp.dynamics._target import Target


Sampling = Literal["shuffle", "replacement"]
# The largest change of the steepest direction, relative, in one coarse step (see `strides`).
_COARSE_STEP = 0.25
# A time to the target that was found in fewer coarse steps than this is found again in finer ones.
_MIN_COARSE_STEPS = 64
# A loss so many times the initial one is given up.
BLOW_UP = 100.0
# How far a kernel grows towards the edge of stability: swings at the edge itself never die down.
_EDGE = 0.8
# No time is shorter, so that it has a logarithm.
_SOONEST = 0.1
# How far the next recorded step is from the last one, relatively.
_SPACING = 1.04

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Simulated training curves of K configurations at up to T recorded steps each.

    Attributes:
        steps:
            Recorded steps, starting with 0, of shape ``(K, T)``; NaN after a curve's end.
        curves:
            Each recorded quantity at these steps, of shape ``(K, T)``; NaN after a curve's end.
            ``"loss"`` and ``"accuracy"`` are those of all training samples,
            ``"validation_loss"`` and ``"validation_accuracy"`` those of the validation samples
            where there are any, ``"smoothed_loss"`` is the smoothed loss of the mini-batches where
            a smoothing was asked for.
        blown_up:
            Whether the loss became infinite, NaN or a hundred times the initial one, ``(K,)``.
        strides:
            Optimiser steps simulated as one, of shape ``(K,)``. One means exactly.
    """

    steps: NDArray[np.float64]
    curves: dict[str, NDArray[np.float64]]
    blown_up: NDArray[np.bool_]
    strides: NDArray[np.int64]

    def first_passage_times(self, target: Target) -> NDArray[np.float64]:
        """Return the step at which each curve is at the target.

        Args:
            target:
                The target that the curves were simulated for.

        Returns:
            Shape ``(K,)``; infinite where the target is not reached or the loss blew up.
        """
        return np.ceil(self.crossings(target) - 1e-9)

    def crossings(self, target: Target) -> NDArray[np.float64]:
        """Return when each curve is at the target, as :meth:`Target.crossing` does.

        Args:
            target:
                The target that the curves were simulated for.

        Returns:
            Shape ``(K,)``; infinite where the target is not reached or the loss blew up.
        """
        watched = self.curves[target.quantity]
        steps = [target.crossing(s, w) for s, w in zip(self.steps, watched, strict=True)]
        return np.where(self.blown_up, np.inf, np.array(steps, dtype=np.float64))

    def log_first_passage_times(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return when the training loss first was at each of several levels.

        Args:
            levels:
                Losses, shape ``(P,)``.

        Returns:
            Logarithms of times in steps, shape ``(K, P)``; NaN where a curve does not get there.
        """
        if not self.steps.size:
            return np.full((len(self.steps), len(levels)), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            losses = np.log(np.where(np.isfinite(self.steps), self.curves["loss"], np.nan))
            lowest = np.fmin.accumulate(losses, axis=1)
            below = lowest[:, None, :] <= np.log(levels)[None, :, None]
            place = below.argmax(axis=2)
            rows = np.arange(len(losses))[:, None]
            after, before = losses[rows, place], losses[rows, np.maximum(place - 1, 0)]
            share = np.where(place > 0, (before - np.log(levels)) / (before - after), 0.0)
            first, last = self.steps[rows, np.maximum(place - 1, 0)], self.steps[rows, place]
            times = np.maximum(first + share * (last - first), _SOONEST)
        return np.where(below.any(axis=2), np.log(times), np.nan)


def simulate(
    model: LinearisedModel,
    sgd: SGDConfigurations,
    batch_size: NDArray[np.int64],
    *,
    max_steps: NDArray[np.int64],
    target: Target | None = None,
    full_curves: bool = False,
    exact: bool = False,
    sampling: Sampling = "shuffle",
    smoothing: Smoothing | None = None,
    growth: KernelGrowth | None = None,
    limit: StabilityLimit | None = None,
    seed: int = 0,
    steps_per_epoch: NDArray[np.int64] | None = None,
) -> Trajectories:
    """Simulate K configurations.

    Args:
        model:
            The linearised model.
        sgd:
            The K configurations.
        batch_size:
            At least 1, of shape ``(K,)``. More than N samples are all samples.
        max_steps:
            Optimiser steps after which a curve ends, of shape ``(K,)``.
        target:
            A curve ends where it reaches this. By default all run to their last step.
        full_curves:
            Go on behind the target, and record the validation curves too. Off by default.
        exact:
            Never take several slow steps as one, see :func:`strides`. Off by default; always so
            where a smoothing is given.
        sampling:
            ``"shuffle"``, a permutation an epoch, by default; or ``"replacement"``. The last batch
            of an epoch may be smaller.
        smoothing:
            Also record the smoothed loss of the mini-batches.
        growth:
            What the kernel is multiplied by as the loss falls. Nothing by default.
        limit:
            Of the model's learning rates. A kernel grows up to the edge of stability only, where
            training holds it (Cohen et al., 2021, "Gradient descent on neural networks typically
            occurs at the edge of stability", arXiv 2103.00065). Nothing holds it by default.
        seed:
            For the order of the samples.
        steps_per_epoch:
            Of schedules that advance with the epoch, shape ``(K,)``. Those of the model's samples
            by default.

    Returns:
        The curves, recorded at every step at first and then at steps 4 % apart.

    Raises:
        ValueError:
            If there is weight decay and the model does not know where it pulls from.
    """
    if sgd.weight_decay.any() and model.pull is None:
        raise ValueError("Weight decay needs a model that knows its pull.")
    n_configurations = len(sgd)
    if steps_per_epoch is None:
        steps_per_epoch = -(-model.n_samples // batch_size)
    stride = np.ones(n_configurations, dtype=np.int64)
    if not exact and smoothing is None:
        stride = strides(model, sgd, batch_size, max_steps, growth, steps_per_epoch)
    ceilings = np.full(n_configurations, np.inf)
    if growth is not None and limit is not None:
        ceilings = limit.headroom(sgd, batch_size, replacement=sampling == "replacement")
    quantities = _quantities(model, target, full_curves, smoothing)
    records: list[list[tuple[float, ...]]] = [[] for _ in range(n_configurations)]
    blown_up = np.zeros(n_configurations, dtype=bool)
    todo = np.arange(n_configurations)
    while len(todo):
        keys = np.stack([batch_size, stride, steps_per_epoch])
        for size, step_size, per_epoch in sorted(set(zip(*keys[:, todo].tolist(), strict=True))):
            same = keys[:, todo] == np.array([[size], [step_size], [per_epoch]])
            members = todo[same.all(axis=0)]
            coarse_steps = np.ceil(max_steps[members] / step_size).astype(np.int64)
            coarse_size = int(size) * int(step_size)
            # So many samples make no noise worth drawing them for.
            if sampling == "shuffle" or coarse_size > max(int(size), 16 * model.n_samples):
                coarse_size = min(coarse_size, model.n_samples)
            blown_up[members] = _simulate_group(
                model,
                _Plan.of(model, sgd[members], per_epoch, step_size, int(coarse_steps.max())),
                _batches(model, coarse_size, sampling, seed, across_epochs=step_size > 1),
                coarse_steps,
                None if full_curves else target,
                quantities,
                smoothing,
                growth,
                np.maximum(_EDGE * ceilings[members], 1.0),
                [records[k] for k in members],
            )
        refined = _refined_strides(records, quantities, stride, target)
        todo = np.flatnonzero(refined < stride)
        for early in todo:
            records[early].clear()
        stride = refined
    length = max(map(len, records), default=0)
    padded = np.full((1 + len(quantities), n_configurations, length), np.nan)
    for k, record in enumerate(records):
        padded[:, k, : len(record)] = np.array(record).T
    curves = dict(zip(quantities, padded[1:], strict=True))
    return Trajectories(padded[0], curves, blown_up, stride)


def strides(
    model: LinearisedModel,
    sgd: SGDConfigurations,
    batch_size: NDArray[np.int64],
    max_steps: NDArray[np.int64],
    growth: KernelGrowth | None = None,
    steps_per_epoch: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return how many optimiser steps may be simulated as one, a power of two.

    Where ``eta_e h_1`` is small (effective learning rate ``eta_e``, largest curvature ``h_1``),
    ``s`` steps of batch size ``B`` move the outputs like one step of batch size ``s B`` (the
    linear scaling rule: drift ``s eta_e`` and noise ``eta_e^2 s / B`` are the same). ``s`` is
    chosen so that ``s eta_e h_1`` is at most 0.25. That is coarse for the steepest direction, but
    the time to a target is mostly set by directions many times flatter; where it is not, the
    target is met after few coarse steps and found again in finer ones. Curves of fewer than 64
    steps are never shortened.

    Args:
        model:
            The linearised model.
        sgd:
            K configurations.
        batch_size:
            Shape ``(K,)``.
        max_steps:
            Shape ``(K,)``.
        growth:
            Of the kernel. None by default.
        steps_per_epoch:
            Of schedules that advance with the epoch, shape ``(K,)``. Those of the model's samples
            by default.

    Returns:
        Integers of shape ``(K,)``.
    """
    effective = sgd.effective_learning_rate
    if steps_per_epoch is None:
        steps_per_epoch = -(-model.n_samples // batch_size)
    if not sgd.schedule.is_constant:
        for per_epoch in np.unique(steps_per_epoch):
            own = np.flatnonzero(steps_per_epoch == per_epoch)
            rates = effective_rates(sgd[own], int(per_epoch), int(max_steps[own].max()))
            effective[own] = rates.max(axis=1)
    if growth is not None:
        effective = effective * float(growth.factors.max())
    change = np.maximum(effective * float(model.curvatures[0]), 1e-30)
    allowed = np.minimum(_COARSE_STEP / change, max_steps / 64.0)
    powers: NDArray[np.float64] = np.floor(np.log2(np.clip(allowed, 1.0, 2.0**40)))
    return (2.0**powers).astype(np.int64)


def effective_rates(
    sgd: SGDConfigurations, steps_per_epoch: int, n_steps: int
) -> NDArray[np.float64]:
    """The effective learning rate at every step, of shape ``(K, T)``."""
    rates, masses = sgd.schedule.values(sgd.learning_rate, sgd.momentum, steps_per_epoch, n_steps)
    gain = np.where(masses > 0, 1.0 - sgd.dampening[:, None], 1.0)
    return rates * gain / (1.0 - masses)


@dataclass(frozen=True, eq=False)
class _Step:
    """Of a :class:`_Plan`, each ``(K, 1)``; no gain where all are one."""

    rate: torch.Tensor
    mass: torch.Tensor
    gain: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a group of K configurations does at each of its T (coarse) steps.

    ``rates``, ``masses`` and ``gain`` have shape ``(K, T)``, or ``(K, 1)`` where nothing changes.
    """

    rates: torch.Tensor
    masses: torch.Tensor
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
    ) -> _Plan:
        n_values = 1 if sgd.schedule.is_constant else n_steps * stride
        rates, masses = sgd.schedule.values(sgd.learning_rate, sgd.momentum, per_epoch, n_values)
        gain = np.where(masses > 0, 1.0 - sgd.dampening[:, None], 1.0)
        nesterov = sgd.nesterov[:, None]
        if stride > 1:
            rates, masses = _coarse_optimiser(rates, masses, gain, nesterov, stride)
            gain, nesterov = np.ones_like(rates), np.zeros_like(nesterov)

        def tensor(values: NDArray[np.float64] | NDArray[np.bool_]) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(values)).to(model.features)

        decay = tensor(sgd.weight_decay[:, None]) if sgd.weight_decay.any() else None
        return cls(tensor(rates), tensor(masses), tensor(gain), tensor(nesterov), decay, stride)

    @cached_property
    def changes(self) -> bool:
        """Whether there is a schedule."""
        return self.rates.shape[1] > 1

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether any momentum is Nesterov's."""
        return bool((self.nesterov > 0).any())

    @cached_property
    def _dampens(self) -> bool:
        return bool((self.gain != 1.0).any())

    def at(self, step: int) -> _Step:
        """What a step does."""
        place = min(step, self.rates.shape[1] - 1)
        gain = self.gain[:, place, None] if self._dampens else None
        return _Step(self.rates[:, place, None], self.masses[:, place, None], gain)

    def keep(self, chosen: torch.Tensor) -> _Plan:
        return _Plan(
            self.rates[chosen],
            self.masses[chosen],
            self.gain[chosen],
            self.nesterov[chosen],
            None if self.decay is None else self.decay[chosen],
            self.stride,
        )


def _coarse_optimiser(
    rates: NDArray[np.float64],
    masses: NDArray[np.float64],
    gain: NDArray[np.float64],
    nesterov: NDArray[np.bool_],
    stride: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rate and momentum of the heavy ball whose one step stands for ``s`` steps.

    It has the effective learning rate ``s eta_e`` and the lag ``(l - (s - 1) / 2) / s``, which
    makes ``s`` times the rate of contraction (see :attr:`SGDConfigurations.lag`) to second order,
    as long as this lag is not negative. Where a schedule changes them, their means over the ``s``
    steps.
    """
    effective = rates * gain / (1.0 - masses)
    lags = lag(masses, nesterov)
    if rates.shape[1] > 1:
        effective, lags = (a.reshape(len(a), -1, stride).mean(axis=2) for a in (effective, lags))
    coarse_lag = np.maximum(0.0, (lags - (stride - 1.0) / 2.0) / stride)
    coarse_mass = coarse_lag / (1.0 + coarse_lag)
    return stride * effective * (1.0 - coarse_mass), coarse_mass


def _quantities(
    model: LinearisedModel, target: Target | None, full_curves: bool, smoothing: Smoothing | None
) -> list[str]:
    quantities = ["loss"]
    wanted = "" if target is None else target.quantity
    if model.labels is not None:
        quantities.append("accuracy")
    if model.validation is not None and (full_curves or wanted.startswith("validation")):
        quantities.append("validation_loss")
        if model.validation.labels is not None:
            quantities.append("validation_accuracy")
    if smoothing is not None:
        quantities.append("smoothed_loss")
    return quantities


def _refined_strides(
    records: list[list[tuple[float, ...]]],
    quantities: list[str],
    stride: NDArray[np.int64],
    target: Target | None,
) -> NDArray[np.int64]:
    """Finer strides for curves that met their target after few coarse steps.

    A coarse step smears the start of training by up to half its length.
    """
    refined = stride.copy()
    if target is None:
        return refined
    column = 1 + quantities.index(target.quantity)
    for k, record in enumerate(records):
        if stride[k] == 1:
            continue
        points = np.array(record)
        reached = target.reached(points[:, column])
        step = points[reached.argmax(), 0]
        if reached.any() and step < _MIN_COARSE_STEPS * stride[k]:
            refined[k] = 2 ** int(np.log2(max(1.0, step / _MIN_COARSE_STEPS)))
    return refined


@torch.inference_mode()
def _simulate_group(
    model: LinearisedModel,
    plan: _Plan,
    batches: Iterator[Batch],
    max_steps: NDArray[np.int64],
    target: Target | None,
    quantities: list[str],
    smoothing: Smoothing | None,
    growth: KernelGrowth | None,
    ceilings: NDArray[np.float64],
    records: list[list[tuple[float, ...]]],
) -> NDArray[np.bool_]:
    """Advance configurations that see the same batches together; append to their records."""
    theta = model.features.new_zeros((len(records), model.rank))
    velocity = torch.zeros_like(theta)
    filtered = None if smoothing is None else _Filter(smoothing)
    blown_up = np.zeros(len(records), dtype=bool)
    active = np.arange(len(records))
    initial = float(model.loss(model.initial_outputs[None]))
    roots = theta.new_ones((len(records), 1))
    lowest = np.full(len(records), initial)
    column = None if target is None else quantities.index(target.quantity)
    now = plan.at(0)
    next_record, next_end = 0, int(max_steps.min())
    step = 0
    while True:
        psi, offset, soft_targets, normalisers = next(batches)
        outputs = (offset + theta @ psi.T).reshape(len(theta), len(normalisers), -1)
        if filtered is not None:
            filtered.update(model.batch_loss(outputs, soft_targets, normalisers))
        if step >= next_record or step >= next_end:
            values = _observe(model, theta, quantities, filtered)
            for k, row in zip(active, values, strict=True):
                records[k].append((float(step * plan.stride), *row))
            bad = ~(values[:, 0] <= BLOW_UP * initial)
            blown_up[active[bad]] = True
            done = bad | (step >= max_steps[active])
            if target is not None and column is not None:
                done |= target.reached(values[:, column])
            if done.all():
                return blown_up
            if done.any():
                keep = torch.as_tensor(~done, device=theta.device)
                theta, velocity, outputs = (t[keep] for t in (theta, velocity, outputs))
                plan = plan.keep(keep)
                if filtered is not None:
                    filtered.keep(keep)
                active, values = active[~done], values[~done]
                next_end = int(max_steps[active].min())
                now = plan.at(step)
            if growth is not None:
                # What has grown stays so while the loss swings: otherwise the swings feed on it.
                lowest[active] = np.fmin(lowest[active], values[:, 0])
                factors = growth.at(lowest[active, None] / initial)
                factors = np.minimum(factors, ceilings[active, None])
                roots = torch.as_tensor(np.sqrt(factors)).to(theta)
            else:
                roots = roots[: len(active)]
            next_record = max(step + 1, int(step * _SPACING))
        residuals = model.residuals(outputs, soft_targets, normalisers)
        gradient = residuals.reshape(len(theta), -1) @ psi
        if plan.decay is not None and model.pull is not None:
            moved = theta if model.decay_factors is None else model.decay_factors * theta
            gradient = gradient + plan.decay * (model.pull + moved)
        if plan.changes:
            now = plan.at(step)
        # The Jacobian grows like the root of the kernel: a gradient enters the velocity with that
        # of its own time, and the velocity moves the outputs with that of now.
        gradient = roots * gradient
        # PyTorch does not dampen the first gradient.
        damped = gradient if now.gain is None or step == 0 else gradient * now.gain
        velocity = torch.addcmul(damped, now.mass, velocity)
        direction = velocity
        if plan.looks_ahead:
            ahead = torch.addcmul(gradient, now.mass, velocity)
            direction = torch.where(plan.nesterov > 0, ahead, velocity)
        theta = torch.addcmul(theta, roots * now.rate, direction, value=-1.0)
        step += 1


def _observe(
    model: LinearisedModel, theta: torch.Tensor, quantities: list[str], filtered: _Filter | None
) -> NDArray[np.float64]:
    """The recorded quantities of K states, of shape ``(K, Q)``."""
    outputs = model.outputs(theta)
    columns = {"loss": model.loss(outputs)}
    if "accuracy" in quantities:
        columns["accuracy"] = model.accuracy(outputs)
    if "validation_loss" in quantities and model.validation is not None:
        held_out = model.validation.outputs(theta)
        columns["validation_loss"] = model.validation.loss(held_out)
        if "validation_accuracy" in quantities:
            columns["validation_accuracy"] = model.validation.accuracy(held_out)
    if filtered is not None:
        columns["smoothed_loss"] = filtered.value
    return torch.stack([columns[q].double() for q in quantities], dim=1).cpu().numpy()


class _Filter:
    """A :class:`Smoothing` of K curves whose values come one step after the other."""

    def __init__(self, smoothing: Smoothing) -> None:
        self._smoothing = smoothing
        self._recent: list[torch.Tensor] = []

    @property
    def value(self) -> torch.Tensor:
        return torch.stack(self._recent).mean(dim=0)

    def update(self, losses: torch.Tensor) -> None:
        width = self._smoothing.width
        if self._smoothing.kind == "exponential" and self._recent:
            self._recent = [width * self._recent[0] + (1.0 - width) * losses]
        else:
            self._recent.append(losses)
            if self._smoothing.kind == "moving_average":
                self._recent = self._recent[-int(width) :]

    def keep(self, chosen: torch.Tensor) -> None:
        self._recent = [losses[chosen] for losses in self._recent]


def _batches(
    model: LinearisedModel, batch_size: int, sampling: Sampling, seed: int, *, across_epochs: bool
) -> Iterator[Batch]:
    """Yield ``Psi_b (B C, r)``, ``f_0 (B C,)``, soft targets and normalisers, without end.

    Each epoch ends with a smaller batch, as in training. The batch of a coarse step stands for
    several of these, and goes on into the next epoch instead.
    """
    n_samples, _, rank = model.features.shape
    whole = [model.features, model.initial_outputs, model.soft_targets, model.normalisers]
    generator = torch.Generator().manual_seed(seed)
    rest = [a[:0] for a in whole]
    while True:
        epoch = whole
        if batch_size < n_samples or sampling == "replacement":
            if sampling == "shuffle":
                order = torch.randperm(n_samples, generator=generator)
            else:
                order = torch.randint(n_samples, (n_samples,), generator=generator)
            epoch = [a[order.to(a.device)] for a in whole]
            if len(rest[0]):
                epoch = [torch.cat(pair) for pair in zip(rest, epoch, strict=True)]
        n_used = len(epoch[0])
        if across_epochs:
            n_used -= n_used % batch_size
        for start in range(0, n_used, batch_size):
            psi, offset, soft_targets, normalisers = (
                a[start : min(start + batch_size, n_used)] for a in epoch
            )
            yield psi.reshape(-1, rank), offset.reshape(-1), soft_targets, normalisers
        rest = [a[n_used:] for a in epoch]
