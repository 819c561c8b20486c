"""Timing of real training steps."""

from __future__ import annotations

from dataclasses import dataclass
import time

import numpy as np
import torch

from optuna_ttp.spectrum._throughput import Throughput
from optuna_ttp.task import FineTuningTask
from optuna_ttp.task import FrozenModel


@dataclass(frozen=True)
class TimingRules:
    """The settings of the timing of steps.

    Attributes:
        long_step:
            A step is long if it takes this multiple of the seconds given to a batch size; larger
            batch sizes are not timed then, because from there on the time grows in proportion to
            the samples. A choice of cost, without a measurement.
        most_repetitions:
            The maximum number of timed steps of a batch size: a choice of cost.
    """

    long_step: float = 10.0
    most_repetitions: int = 50


RULES = TimingRules()


def measure_throughput(
    task: FineTuningTask,
    *,
    device: torch.device,
    batch_sizes: tuple[int, ...] = (2, 8, 32, 128),
    seconds_per_batch_size: float = 0.05,
) -> Throughput:
    """Time training steps (forward, loss, backward, update of copied weights) on the task's data.

    Each batch size (N in place of larger ones) is repeated for ``seconds_per_batch_size``, at
    least once, after a warm-up step if it is the first or steps are short. Returns the medians.
    """
    distinct = sorted({min(batch_size, task.n_samples) for batch_size in batch_sizes})
    seconds: list[float] = []
    with task.frozen(device, torch.float32, training=True) as frozen:
        trained = {k: p.detach().clone().requires_grad_() for k, p in frozen.parameters.items()}
        frozen.replace_parameters(trained)
        for batch_size in distinct:
            if len(seconds) > 1 and seconds[-1] > RULES.long_step * seconds_per_batch_size > 0.0:
                break
            inputs, _ = next(task.batches(batch_size, device, torch.float32))
            timings: list[float] = []
            # A warm-up changes little if steps are long, and costs as much as a step.
            if not seconds or seconds[-1] < seconds_per_batch_size:
                _time_step(frozen, inputs, device)
            while not timings or (
                sum(timings) < seconds_per_batch_size and len(timings) < RULES.most_repetitions
            ):
                timings.append(_time_step(frozen, inputs, device))
            seconds.append(float(np.median(timings)))
    # A larger batch cannot be faster; if it seems so, that is the noise of a shared machine.
    return Throughput(
        np.array(distinct[: len(seconds)], dtype=np.int64),
        np.maximum.accumulate(seconds),
        device=str(device),
    )


def _time_step(frozen: FrozenModel, inputs: object, device: torch.device) -> float:
    """Return the seconds of one training step with learning rate zero."""
    started = time.perf_counter()
    parameters = list(frozen.parameters.values())
    # The loss itself costs next to nothing, but gradients must flow from all outputs.
    loss = frozen(inputs).square().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
