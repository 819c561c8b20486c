"""Seconds per training step by batch size."""

from __future__ import annotations

from dataclasses import dataclass
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


if TYPE_CHECKING:
    import torch

    from optuna_ttp.frozen_model import FrozenModel
    from optuna_ttp.task import FineTuningTask


@dataclass(frozen=True, eq=False)
class Throughput:
    """Measured seconds per step at a few batch sizes, interpolated between them.

    Example:
        >>> throughput = Throughput(np.array([8, 32]), np.array([0.01, 0.02]), device="cpu")
        >>> throughput.seconds_per_step(20)
        array(0.015)

    Attributes:
        batch_sizes:
            Shape ``(k,)``, ascending.
        seconds:
            Seconds per step at each, shape ``(k,)``, not descending.
        device:
            Where it was measured.
    """

    batch_sizes: NDArray[np.int64]
    seconds: NDArray[np.float64]
    device: str

    def __post_init__(self) -> None:
        if len(self.batch_sizes) == 0 or len(self.batch_sizes) != len(self.seconds):
            raise ValueError(
                "batch_sizes and seconds must have the same length of at least one but got "
                f"{len(self.batch_sizes)} and {len(self.seconds)}."
            )
        if self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes must be positive but got {self.batch_sizes}.")
        if np.any(np.diff(self.batch_sizes) <= 0) or np.any(np.diff(self.seconds) < 0):
            raise ValueError(
                "batch_sizes must ascend and seconds must not descend but got "
                f"{self.batch_sizes} and {self.seconds}."
            )
        if not (np.isfinite(self.seconds).all() and self.seconds[0] > 0):
            raise ValueError(f"seconds must be finite and positive but got {self.seconds}.")

    def seconds_per_step(self, batch_size: ArrayLike) -> NDArray[np.float64]:
        """Interpolate linearly; the last slope goes on above, the first value below.

        Args:
            batch_size:
                Any shape.

        Returns:
            Seconds per step, of the same shape.
        """
        batch_size = np.asarray(batch_size, dtype=np.float64)
        inside = np.interp(batch_size, self.batch_sizes, self.seconds)
        if len(self.seconds) == 1:
            return np.asarray(inside)
        slope = (self.seconds[-1] - self.seconds[-2]) / (
            self.batch_sizes[-1] - self.batch_sizes[-2]
        )
        return np.asarray(inside + slope * np.maximum(0, batch_size - self.batch_sizes[-1]))


def measure_throughput(
    task: FineTuningTask,
    *,
    device: torch.device,
    batch_sizes: tuple[int, ...] = (2, 8, 32, 128),
    seconds_per_size: float = 0.3,
) -> Throughput:
    """Time real steps (forward, loss, backward, weight update) on the task's own data.

    The weights that are updated are copies. The median over the repetitions is taken; at least
    three follow a warm-up step.

    Args:
        task:
            What is fine-tuned.
        device:
            Where to run.
        batch_sizes:
            What to measure. In place of sizes above N it is N.
        seconds_per_size:
            Stop repeating a batch size after so long. 0.3 s by default.

    Returns:
        The measured seconds per step.
    """
    import torch

    sizes = sorted({min(size, task.n_samples) for size in batch_sizes})
    seconds = []
    with task.frozen(device, torch.float32, training=True) as frozen:
        trained = {k: p.detach().clone().requires_grad_() for k, p in frozen.parameters.items()}
        frozen.replace_parameters(trained)
        for size in sizes:
            inputs, _ = next(task.batches(size, device, torch.float32))
            timings: list[float] = []
            _time_step(frozen, inputs, device)
            while len(timings) < 3 or (sum(timings) < seconds_per_size and len(timings) < 50):
                timings.append(_time_step(frozen, inputs, device))
            seconds.append(float(np.median(timings)))
    # A larger batch cannot be faster; where it seems so, that is the noise of a shared machine.
    return Throughput(
        np.array(sizes, dtype=np.int64), np.maximum.accumulate(seconds), device=str(device)
    )


def _time_step(frozen: FrozenModel, inputs: object, device: torch.device) -> float:
    import torch

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
