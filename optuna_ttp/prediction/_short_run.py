"""A few real steps of one configuration, to see whether the kernel moves."""

from __future__ import annotations

from dataclasses import dataclass
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics import LinearisedModel


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


# Samples that go through the network together.
_CHUNK = 64
# A loss so many times the initial one is given up.
_GIVE_UP = 100.0


@dataclass(frozen=True, eq=False)
class ShortRun:
    """The training loss of a few full-batch steps.

    Attributes:
        losses:
            Training loss over all samples before each step and after the last, ``(steps + 1,)``;
            shorter where it blew up.
        seconds:
            What it took.
    """

    losses: NDArray[np.float64]
    seconds: float


def train_short_run(
    task: FineTuningTask,
    model: LinearisedModel,
    *,
    learning_rate: float,
    momentum: float,
    steps: int,
    device: torch.device,
) -> ShortRun:
    """Train the network for a few steps of full-batch gradient descent, and put it back.

    Full-batch steps, because the losses of a few mini-batches would tell more about the batches
    than about the network.

    Args:
        task:
            Network and data.
        model:
            The linearised model, for the loss and its gradient with respect to the outputs.
        learning_rate:
            Of SGD; parameter groups have theirs times the task's multipliers.
        momentum:
            Of SGD.
        steps:
            How many.
        device:
            Where to train.

    Returns:
        The losses.
    """
    started = time.perf_counter()
    losses: list[float] = []
    with task.frozen(device, torch.float32) as frozen:
        weights = {k: p.detach().clone().requires_grad_() for k, p in frozen.parameters.items()}
        frozen.replace_parameters(weights)
        velocity = [torch.zeros_like(w) for w in weights.values()]
        for step in range(steps + 1):
            loss, gradient = _gradient(task, model, frozen, device, wanted=step < steps)
            losses.append(loss)
            if not loss <= _GIVE_UP * losses[0]:
                break
            with torch.no_grad():
                for w, v, g, c in zip(
                    weights.values(), velocity, gradient, task.multipliers.values(), strict=True
                ):
                    v.mul_(momentum).add_(g)
                    w.sub_(v, alpha=learning_rate * c)
    return ShortRun(np.array(losses), time.perf_counter() - started)


def _gradient(
    task: FineTuningTask,
    model: LinearisedModel,
    frozen: FrozenModel,
    device: torch.device,
    *,
    wanted: bool,
) -> tuple[float, list[torch.Tensor]]:
    """Training loss over all samples, and its gradient; zeros where that is not wanted."""
    parameters = list(frozen.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    whole = float(model.normalisers.sum())
    loss = 0.0
    start = 0
    for inputs, _ in task.batches(_CHUNK, device, torch.float32):
        with torch.set_grad_enabled(wanted):
            outputs = frozen(inputs)
        rows = slice(start, start + len(outputs))
        start += len(outputs)
        soft, normalisers = (a[rows].to(outputs) for a in (model.soft_targets, model.normalisers))
        share = float(normalisers.sum()) / whole
        loss += share * float(model.batch_loss(outputs.detach()[None], soft, normalisers))
        if wanted:
            seeds = share * model.residuals(outputs.detach()[None], soft, normalisers)[0]
            parts = torch.autograd.grad(
                outputs, parameters, seeds, allow_unused=True, materialize_grads=True
            )
            for sum_, part in zip(total, parts, strict=True):
                sum_ += part if part.layout == torch.strided else part.to_dense()
    return loss, total
