"""Training with AdamW as it is recorded."""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from benchmarks.accuracy.adamw.recording import Curve
from benchmarks.accuracy.adamw.recording import End
from benchmarks.accuracy.adamw.run import Run
from benchmarks.accuracy.tasks import Tuning
from benchmarks.accuracy.training import accumulate_gradient
from benchmarks.accuracy.training import evaluate
from benchmarks.accuracy.training import mini_batches


# A run ends where the loss over all samples is at this share of the initial one.
_DEEPEST = 0.08
# A run has diverged when so many successive mini-batch losses are above so many initial ones.
_PATIENCE = 20
_DIVERGED = 10.0


def evaluated_steps(max_steps: int, spacing: float) -> list[int]:
    """Return the steps at which the loss over all samples is taken.

    Args:
        max_steps:
            Is the last one.
        spacing:
            Ratio of two of them; all steps are taken where it gives less than one step.

    Returns:
        0, 1, 2, ... and roughly a geometric series.
    """
    count = math.ceil(math.log(max(max_steps, 2)) / math.log(spacing))
    series = {round(spacing**k) for k in range(count + 1)}
    return sorted({0, max_steps, *(step for step in series if step < max_steps)})


def train(model: torch.nn.Module, tuning: Tuning, run: Run, spacing: float) -> Curve:
    """Train a network.

    Args:
        model:
            Is trained in place, all weights that require a gradient, in the mode it is in.
        tuning:
            Data and loss.
        run:
            The configuration.
        spacing:
            Ratio of two steps at which the loss over all samples is taken.

    Returns:
        The course of the run.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        weights,
        lr=run.learning_rate,
        betas=(run.beta_1, run.beta_2),
        eps=run.eps,
        weight_decay=run.weight_decay,
        fused=True,
    )
    evaluated = set(evaluated_steps(run.max_steps, spacing))
    batches = mini_batches(len(tuning.labels), run.batch_size, run.seed)
    losses: list[float] = []
    norms: list[float] = []
    full: list[tuple[float, float, float]] = []
    seconds = 0.0
    end: End = "steps"
    for step in range(run.max_steps + 1):
        if step in evaluated:
            full.append((step, *evaluate(model, tuning)))
            if full[-1][1] <= _DEEPEST * full[0][1]:
                end = "loss"
                break
        if _has_diverged(losses, full[0][1]):
            end = "diverged"
            break
        if step == run.max_steps:
            break
        started = time.process_time()
        optimiser.zero_grad()
        loss, _ = accumulate_gradient(model, tuning, next(batches))
        norm = _clip(weights, run.max_grad_norm)
        optimiser.param_groups[0]["lr"] = run.rate(step)
        optimiser.step()
        seconds += time.process_time() - started
        losses.append(loss)
        norms.append(norm)
    steps, full_losses, accuracies = np.array(full).T
    return Curve(np.array(losses), np.array(norms), steps, full_losses, accuracies, seconds, end)


def _clip(weights: list[torch.nn.Parameter], max_norm: float | None) -> float:
    """Clip the gradients as ``torch.nn.utils.clip_grad_norm_`` does; return their norm before."""
    if max_norm is not None:
        return float(torch.nn.utils.clip_grad_norm_(weights, max_norm))
    return float(torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]))


def _has_diverged(losses: list[float], initial: float) -> bool:
    if losses and not math.isfinite(losses[-1]):
        return True
    last = losses[-_PATIENCE:]
    return len(last) == _PATIENCE and min(last) > _DIVERGED * initial
