"""Timing of real training steps."""

from __future__ import annotations

import time

import numpy as np
import torch

from optuna_ttp.spectrum._throughput import Throughput
from optuna_ttp.task import FineTuningTask
from optuna_ttp.task import FrozenModel


# A step that takes so many times what is spent on a batch size.
_LONG_STEP = 10.0


def measure_throughput(
    task: FineTuningTask,
    *,
    device: torch.device,
    batch_sizes: tuple[int, ...] = (2, 8, 32, 128),
    seconds_per_size: float = 0.05,
) -> Throughput:
    """Time real steps (forward, loss, backward, weight update) on the task's own data.

    The weights that are updated are copies. The median over the repetitions is taken; there is
    one at least, after a warm-up step where steps are short or the first ones.

    Args:
        task:
            What is fine-tuned.
        device:
            Where to run.
        batch_sizes:
            What to measure, ascending. In place of sizes above N it is N. Behind the first two,
            the rest is left out where a step takes ten times ``seconds_per_size``: from there on
            a sample more is a sample's time more.
        seconds_per_size:
            Stop repeating a batch size after so long. 0.05 s by default.

    Returns:
        The measured seconds per step.
    """
    sizes = sorted({min(size, task.n_samples) for size in batch_sizes})
    seconds: list[float] = []
    with task.frozen(device, torch.float32, training=True) as frozen:
        trained = {k: p.detach().clone().requires_grad_() for k, p in frozen.parameters.items()}
        frozen.replace_parameters(trained)
        for size in sizes:
            if len(seconds) > 1 and seconds[-1] > _LONG_STEP * seconds_per_size > 0.0:
                break
            inputs, _ = next(task.batches(size, device, torch.float32))
            timings: list[float] = []
            # A warm-up changes little of what takes long, and costs as much.
            if not seconds or seconds[-1] < seconds_per_size:
                _time_step(frozen, inputs, device)
            while not timings or (sum(timings) < seconds_per_size and len(timings) < 50):
                timings.append(_time_step(frozen, inputs, device))
            seconds.append(float(np.median(timings)))
    # A larger batch cannot be faster; where it seems so, that is the noise of a shared machine.
    return Throughput(
        np.array(sizes[: len(seconds)], dtype=np.int64),
        np.maximum.accumulate(seconds),
        device=str(device),
    )


def _time_step(frozen: FrozenModel, inputs: object, device: torch.device) -> float:
    started = time.perf_counter()
    parameters = list(frozen.parameters.values())
    # The loss itself costs next to nothing; what counts is that gradients flow from all outputs.
    loss = frozen(inputs).square().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
