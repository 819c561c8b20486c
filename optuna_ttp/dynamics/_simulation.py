"""Mini-batch SGD on the linearised model, simulated step by step.

Nothing about the optimiser is approximated if the stride is one: the update of
:class:`torch.optim.SGD` with momentum, dampening, Nesterov's variant, L2 weight decay and a
schedule, on batches as a data loader draws them. Only linearisation and truncation remain as
errors. Configurations with the same batch size advance together and see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._growth import KernelGrowth
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._plan import Plan
from optuna_ttp.dynamics._plan import RULES
from optuna_ttp.dynamics._plan import SimulationRules
from optuna_ttp.dynamics._plan import strides
from optuna_ttp.dynamics._sampling import Sampling
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
from optuna_ttp.dynamics._smoothing import Smoothing
from optuna_ttp.dynamics._stability import StabilityLimit
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Record
from optuna_ttp.dynamics._trajectories import Trajectories


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def simulate(
    model: LinearisedModel,
    sgd: SGDConfigurations,
    batch_size: Integers,
    *,
    max_steps: Integers,
    target: Target | None = None,
    full_curves: bool = False,
    exact: bool = False,
    sampling: Sampling = "shuffle",
    smoothing: Smoothing | None = None,
    growth: KernelGrowth | None = None,
    limit: StabilityLimit | None = None,
    seed: int = 0,
    steps_per_epoch: Integers | None = None,
    rules: SimulationRules = RULES,
) -> Trajectories:
    """Return the simulated curves of K configurations.

    They are recorded at every step at first and then at steps 4 % apart. Arrays are of shape
    ``(K,)``. A curve ends after its ``max_steps``, when it reaches the target (unless
    ``full_curves`` is set, which also adds validation curves), or when its loss blows up. Several
    slow steps are simulated as one, see :func:`strides`, unless ``exact`` or a smoothing of the
    mini-batch losses is given. Batches are drawn from one permutation per epoch, whose last batch
    may be smaller, or with replacement; ``seed`` decides their order.

    ``growth`` multiplies the kernel as the loss falls; with a ``limit`` the kernel grows only up
    to the edge of stability, where training keeps it (Cohen et al., 2021, "Gradient descent on
    neural networks typically occurs at the edge of stability", arXiv 2103.00065). A schedule per
    epoch advances after ``steps_per_epoch`` steps, by default the batches in the model's samples.
    Weight decay without :attr:`LinearisedModel.pull` raises a ValueError.
    """
    if sgd.weight_decay.any() and model.pull is None:
        raise ValueError("Weight decay needs a model that knows its pull.")
    n_configurations = len(sgd)
    if steps_per_epoch is None:
        steps_per_epoch = -(-model.n_samples // batch_size)
    stride = np.ones(n_configurations, dtype=np.int64)
    if not exact and smoothing is None:
        stride = strides(model, sgd, max_steps, growth, steps_per_epoch, rules)
    ceilings = np.full(n_configurations, np.inf)
    if growth is not None and limit is not None:
        ceilings = limit.headroom(sgd, batch_size, replacement=sampling == "replacement")
    quantities = _quantities(model, target, full_curves, smoothing)
    records: list[Record] = [[] for _ in range(n_configurations)]
    blown_up = np.zeros(n_configurations, dtype=bool)
    todo = np.arange(n_configurations)
    while len(todo):
        keys = np.stack([batch_size, stride, steps_per_epoch])
        for samples, span, per_epoch in sorted(set(zip(*keys[:, todo].tolist(), strict=True))):
            same = keys[:, todo] == np.array([[samples], [span], [per_epoch]])
            members = todo[same.all(axis=0)]
            coarse_steps = np.ceil(max_steps[members] / span).astype(np.int64)
            coarse_batch = int(samples) * int(span)
            # The noise of so many samples is negligible.
            if sampling == "shuffle" or coarse_batch > max(int(samples), 16 * model.n_samples):
                coarse_batch = min(coarse_batch, model.n_samples)
            blown_up[members] = _simulate_group(
                model,
                Plan.of(model, sgd[members], per_epoch, span, int(coarse_steps.max())),
                _batches(model, coarse_batch, sampling, seed, across_epochs=span > 1),
                coarse_steps,
                None if full_curves else target,
                quantities,
                smoothing,
                growth,
                np.maximum(rules.edge * ceilings[members], 1.0),
                [records[k] for k in members],
                rules,
            )
        refined = _refined_strides(records, quantities, stride, target, rules.min_coarse_steps)
        todo = np.flatnonzero(refined < stride)
        for early in todo:
            records[early].clear()
        stride = refined
    return Trajectories.of_records(records, quantities, blown_up, stride)


def _quantities(
    model: LinearisedModel, target: Target | None, full_curves: bool, smoothing: Smoothing | None
) -> list[str]:
    """Return the names of the quantities that are recorded, the training loss first."""
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
    records: list[Record],
    quantities: list[str],
    stride: Integers,
    target: Target | None,
    min_coarse_steps: int,
) -> Integers:
    """Return strides ``(K,)``, smaller if the target took fewer than ``min_coarse_steps`` strides.

    A stride is the number of optimiser steps that are simulated as one; early in training times
    are wrong by up to half a stride.
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
        if reached.any() and step < min_coarse_steps * stride[k]:
            refined[k] = 2 ** int(np.log2(max(1.0, step / min_coarse_steps)))
    return refined


@torch.inference_mode()
def _simulate_group(
    model: LinearisedModel,
    plan: Plan,
    batches: Iterator[Batch],
    max_steps: Integers,
    target: Target | None,
    quantities: list[str],
    smoothing: Smoothing | None,
    growth: KernelGrowth | None,
    ceilings: Floats,
    records: list[Record],
    rules: SimulationRules,
) -> Booleans:
    """Train K configurations on the same batches, append to their records, return which blew up.

    A row of a record is the optimiser step and the values of ``quantities`` at that step. The
    kernel grows by at most ``ceilings``; these and the returned mask have the shape ``(K,)``.
    """
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
            bad = ~(values[:, 0] <= rules.blow_up * initial)
            blown_up[active[bad]] = True
            done = bad | (step >= max_steps[active])
            if target is not None and column is not None:
                done |= target.reached(values[:, column])
            if done.all():
                return blown_up
            if done.any():
                keep = torch.as_tensor(~done, device=theta.device)
                theta, velocity, outputs = (t[keep] for t in (theta, velocity, outputs))
                plan = plan.restricted(keep)
                if filtered is not None:
                    filtered.restrict(keep)
                active, values = active[~done], values[~done]
                next_end = int(max_steps[active].min())
                now = plan.at(step)
            if growth is not None:
                # The growth follows the lowest loss so far: with the present loss it would
                # amplify the oscillations of the loss.
                lowest[active] = np.fmin(lowest[active], values[:, 0])
                factors = growth.at(lowest[active, None] / initial)
                factors = np.minimum(factors, ceilings[active, None])
                roots = torch.as_tensor(np.sqrt(factors)).to(theta)
            else:
                roots = roots[: len(active)]
            next_record = max(step + 1, int(step * rules.spacing))
        residuals = model.residuals(outputs, soft_targets, normalisers)
        gradient = residuals.reshape(len(theta), -1) @ psi
        if plan.decay is not None and model.pull is not None:
            moved = theta if model.decay_factors is None else model.decay_factors * theta
            gradient = gradient + plan.decay * (model.pull + moved)
        if plan.changes:
            now = plan.at(step)
        # The Jacobian grows like the root of the kernel: a gradient enters the velocity with the
        # root at the gradient's step, and the velocity moves the outputs with the present root.
        gradient = roots * gradient
        # PyTorch does not dampen the first gradient.
        damped = gradient if now.gain is None or step == 0 else gradient * now.gain
        velocity = torch.addcmul(damped, now.momentum, velocity)
        direction = velocity
        if plan.looks_ahead:
            ahead = torch.addcmul(gradient, now.momentum, velocity)
            direction = torch.where(plan.nesterov > 0, ahead, velocity)
        theta = torch.addcmul(theta, roots * now.rate, direction, value=-1.0)
        step += 1


def _observe(
    model: LinearisedModel, theta: torch.Tensor, quantities: list[str], filtered: _Filter | None
) -> Floats:
    """Return the values ``(K, Q)`` of the named quantities at K states ``theta``, ``(K, r)``."""
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
    """Smooths K loss curves by a :class:`Smoothing`, one step after the other."""

    def __init__(self, smoothing: Smoothing) -> None:
        self._smoothing = smoothing
        self._recent: list[torch.Tensor] = []

    @property
    def value(self) -> torch.Tensor:
        """The present smoothed loss of each curve, ``(K,)``."""
        return torch.stack(self._recent).mean(dim=0)

    def update(self, losses: torch.Tensor) -> None:
        """Add the mini-batch loss of each curve at the next step, ``(K,)``."""
        width = self._smoothing.width
        if self._smoothing.kind == "exponential" and self._recent:
            self._recent = [width * self._recent[0] + (1.0 - width) * losses]
        else:
            self._recent.append(losses)
            if self._smoothing.kind == "moving_average":
                self._recent = self._recent[-int(width) :]

    def restrict(self, chosen: torch.Tensor) -> None:
        """Drop the curves that a mask ``(K,)`` does not choose."""
        self._recent = [losses[chosen] for losses in self._recent]


def _batches(
    model: LinearisedModel, batch_size: int, sampling: Sampling, seed: int, *, across_epochs: bool
) -> Iterator[Batch]:
    """Yield batches without end: ``Psi_b (B C, r)``, ``f_0 (B C,)``, targets and normalisers.

    An epoch may end with a smaller batch, as in training; with ``across_epochs``, for coarse
    steps, the last batch is filled up with samples of the next epoch instead.
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
