"""Mini-batch training on the linearised model, simulated step by step.

Nothing about the optimiser is approximated if the stride is one: the update of
:class:`torch.optim.SGD`, :class:`torch.optim.Adam` or :class:`torch.optim.AdamW` with all their
settings, clipping, accumulation of gradients and a schedule, on batches as a data loader draws
them. Only linearisation, and truncation or the sampling of columns, remain as errors.
Configurations with the same batch size advance together and see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._adam_configurations import AdamConfigurations
from optuna_ttp.dynamics._adam_update import AdamUpdate
from optuna_ttp.dynamics._batches import Batch
from optuna_ttp.dynamics._batches import batches
from optuna_ttp.dynamics._growth import KernelGrowth
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._plan import Plan
from optuna_ttp.dynamics._plan import RULES
from optuna_ttp.dynamics._plan import SimulationRules
from optuna_ttp.dynamics._plan import strides
from optuna_ttp.dynamics._sampling import Sampling
from optuna_ttp.dynamics._saturation import Saturation
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
from optuna_ttp.dynamics._sgd_update import SGDUpdate
from optuna_ttp.dynamics._slowed_steps import SlowedSteps
from optuna_ttp.dynamics._smoothing import Smoothing
from optuna_ttp.dynamics._stability import StabilityLimit
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Record
from optuna_ttp.dynamics._trajectories import Trajectories


OptimiserConfigurations = SGDConfigurations | AdamConfigurations


def simulate(
    model: LinearisedModel,
    configurations: OptimiserConfigurations,
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
    saturation: Saturation | None = None,
    seed: int = 0,
    steps_per_epoch: Integers | None = None,
    rules: SimulationRules = RULES,
) -> Trajectories:
    """Return the simulated curves of K configurations.

    They are recorded at every step at first and then at steps 4 % apart. Arrays are of shape
    ``(K,)``. A curve ends after its ``max_steps``, when it reaches the target (unless
    ``full_curves`` is set, which also adds validation curves), or when its loss blows up. Several
    slow steps of plain SGD are simulated as one, see :func:`strides`, unless ``exact`` or a
    smoothing of the mini-batch losses is given. Batches are drawn from one permutation per epoch,
    whose last batch may be smaller, or with replacement; ``seed`` decides their order.

    ``growth`` multiplies the kernel as the loss falls; with a ``limit`` the kernel grows only up
    to the edge of stability, where training by SGD keeps it (Cohen et al., 2021, "Gradient descent
    on neural networks typically occurs at the edge of stability", arXiv 2103.00065). With
    ``saturation`` large steps move the outputs less far. A schedule per epoch advances after
    ``steps_per_epoch`` steps, by default those of the model's samples. ValueError for weight decay
    without :attr:`LinearisedModel.pull`, and for Adam or groups without
    :attr:`LinearisedModel.weights`.
    """
    check_model(model, configurations)
    n_configurations = len(configurations)
    together = batch_size * configurations.accumulation_steps
    if steps_per_epoch is None:
        n_batches = -(-model.n_samples // batch_size)
        steps_per_epoch = -(-n_batches // configurations.accumulation_steps)
    stride = np.ones(n_configurations, dtype=np.int64)
    ceilings = np.full(n_configurations, np.inf)
    if isinstance(configurations, SGDConfigurations):
        plain = model.weights is None and configurations.max_grad_norm is None
        if plain and not exact and smoothing is None:
            curvature = float(model.curvatures[0])
            stride = strides(curvature, configurations, max_steps, growth, steps_per_epoch, rules)
        if growth is not None and limit is not None:
            replacement = sampling == "replacement"
            ceilings = limit.headroom(configurations, together, replacement=replacement)
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
            blown_up[members] = _simulate_group(
                model,
                _update(
                    model,
                    configurations[members],
                    int(samples),
                    int(per_epoch),
                    int(span),
                    int(coarse_steps.max()),
                    saturation,
                ),
                _batches(model, configurations, int(samples), int(span), sampling, seed),
                coarse_steps,
                span,
                configurations.max_grad_norm,
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


def check_model(model: LinearisedModel, configurations: OptimiserConfigurations) -> None:
    """Raise ValueError if a model lacks what an optimiser needs."""
    adam = isinstance(configurations, AdamConfigurations)
    if model.weights is None and (adam or configurations.groups is not None):
        raise ValueError(
            "Adam and parameter groups act on single weights and need a model of columns, "
            "LinearisedModel.from_columns(spectrum), but got one of eigen-directions."
        )
    if model.pull is None and np.any(configurations.weight_decay):
        raise ValueError("Weight decay needs a model that knows its pull.")
    if model.decay_factors is not None and configurations.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm needs the norm of the gradient, which a spectrum with learning-rate "
            "multipliers does not know. Give the optimiser groups instead of the multipliers."
        )


def _batches(
    model: LinearisedModel,
    configurations: OptimiserConfigurations,
    batch_size: int,
    stride: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[Batch]:
    """Yield batches without end; one of a coarse step has the samples of all its steps."""
    n_accumulated = configurations.accumulation_steps
    if stride == 1:
        n_drawn = min(batch_size, model.n_samples) if sampling == "shuffle" else batch_size
        return batches(model, n_drawn, sampling, seed, accumulation_steps=n_accumulated)
    coarse = batch_size * n_accumulated * stride
    # The noise of so many samples is negligible.
    if sampling == "shuffle" or coarse > max(batch_size, 16 * model.n_samples):
        coarse = min(coarse, model.n_samples)
    return batches(model, coarse, sampling, seed, across_epochs=True)


def _update(
    model: LinearisedModel,
    configurations: OptimiserConfigurations,
    batch_size: int,
    steps_per_epoch: int,
    stride: int,
    n_steps: int,
    saturation: Saturation | None,
) -> SGDUpdate | AdamUpdate:
    """Return the optimiser's state at the start for K configurations of one batch size."""
    theta = model.features.new_zeros((len(configurations), model.rank))
    samples = batch_size * configurations.accumulation_steps
    if isinstance(configurations, AdamConfigurations):
        return AdamUpdate(
            model,
            configurations,
            theta,
            steps_per_epoch=steps_per_epoch,
            n_steps=n_steps,
            batch_size=samples,
            saturation=saturation,
        )
    plan = Plan.of(theta, configurations, steps_per_epoch, stride, n_steps)
    slowed = None
    # Steps that are simulated as one are short.
    if saturation is not None and stride == 1:
        rates, ratios = saturation.of_batch_size(samples)
        inflation = None if model.weights is None else model.weights.inflation
        slowed = SlowedSteps(rates * model.gradient_length(samples), ratios, theta, inflation)
    return SGDUpdate(model, configurations, plan, theta, slowed)


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
    update: SGDUpdate | AdamUpdate,
    drawn: Iterator[Batch],
    max_steps: Integers,
    stride: int,
    max_grad_norm: float | None,
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
    filtered = None if smoothing is None else _Filter(smoothing)
    blown_up = np.zeros(len(records), dtype=bool)
    active = np.arange(len(records))
    initial = float(model.loss(model.initial_outputs[None]))
    roots: torch.Tensor | None = None
    lowest = np.full(len(records), initial)
    column = None if target is None else quantities.index(target.quantity)
    spacing = rules.spacing if model.low_rank is None else rules.product_spacing
    next_record, next_end = 0, int(max_steps.min())
    step = 0
    while True:
        batch = next(drawn)
        outputs = batch.outputs(theta)
        if filtered is not None:
            filtered.update(batch.losses(model, outputs))
        if step >= next_record or step >= next_end:
            values = _observe(model, theta, quantities, filtered)
            for k, row in zip(active, values, strict=True):
                records[k].append((float(step * stride), *row))
            bad = ~(values[:, 0] <= rules.blow_up * initial)
            blown_up[active[bad]] = True
            done = bad | (step >= max_steps[active])
            if target is not None and column is not None:
                done |= target.reached(values[:, column])
            if done.all():
                return blown_up
            if done.any():
                keep = torch.as_tensor(~done, device=theta.device)
                theta, outputs = theta[keep], outputs[keep]
                update.restrict(keep)
                if filtered is not None:
                    filtered.restrict(keep)
                active, values = active[~done], values[~done]
                next_end = int(max_steps[active].min())
            if growth is not None:
                # The growth follows the lowest loss so far: with the present loss it would
                # amplify the oscillations of the loss.
                lowest[active] = np.fmin(lowest[active], values[:, 0])
                factors = growth.at(lowest[active, None] / initial)
                factors = np.minimum(factors, ceilings[active, None])
                roots = torch.as_tensor(np.sqrt(factors)).to(theta)
            next_record = max(step + 1, int(step * spacing))
        gradient = batch.gradient(theta, batch.residuals(model, outputs))
        if model.weights is not None:
            model.weights.without_rest(gradient)
        if max_grad_norm is not None:
            gradient = _clipped(model, gradient, roots, max_grad_norm)
        theta = update.step(theta, gradient, roots)
        step += 1


def _clipped(
    model: LinearisedModel, gradient: torch.Tensor, roots: torch.Tensor | None, max_norm: float
) -> torch.Tensor:
    """Return gradients ``(K, r)``, shortened as :func:`torch.nn.utils.clip_grad_norm_` does it."""
    norms = model.gradient_norms(gradient)
    if roots is not None:
        norms = roots * norms
    return gradient * (max_norm / (norms + 1e-6)).clamp(max=1.0)


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
