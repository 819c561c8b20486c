"""Linear models with held-out samples, and their real training."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import Validation
from optuna_ttp.task import FineTuningTask
from tests.cases import linear_task
from tests.cases import spectrum


LOSSES = {
    "cross-entropy": torch.nn.CrossEntropyLoss(),
    "weighted and smoothed": torch.nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
    ),
    "mse": torch.nn.MSELoss(),
}


def linear_spectrum(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


def validated_task(loss: str = "cross-entropy") -> FineTuningTask:
    """A linear layer with held-out samples that are like the training samples."""
    plain = linear_task(LOSSES[loss])
    x, y = plain._dataset.tensors
    generator = torch.Generator().manual_seed(9)
    more = x[:7] + 0.3 * torch.randn(7, 6, generator=generator, dtype=torch.float64)
    targets = y[:7].clone()
    targets[5:] = y[3:5]
    return FineTuningTask(plain.model, (x, y), LOSSES[loss], validation_data=(more, targets))


def validated_spectrum(task: FineTuningTask, **settings: Any) -> Spectrum:
    return compute_spectrum(
        task, dtype="float64", measure_speed=False, device="cpu", probe=False, **settings
    )


@cache
def spectrum_of(loss: str = "cross-entropy") -> Spectrum:
    return validated_spectrum(validated_task(loss))


def validation_of(one: Spectrum) -> Validation:
    assert one.validation is not None
    return one.validation


def train(
    task: FineTuningTask,
    loss: torch.nn.Module,
    batch_size: int,
    n_steps: int,
    learning_rate: float,
    momentum: float,
    seed: int = 0,
    **settings: Any,
) -> dict[str, NDArray[np.float64]]:
    """Losses and accuracies before every step of a real training by torch.optim.SGD."""
    model = copy.deepcopy(task.model)
    parts = {"": task._dataset.tensors}
    if task.validation is not None:
        parts["validation_"] = task.validation._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum, **settings)
    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {}
    batches: list[torch.Tensor] = []
    x, y = parts[""]
    for _ in range(n_steps + 1):
        with torch.no_grad():
            for name, (inputs, targets) in parts.items():
                outputs = model(inputs)
                labels = targets.argmax(dim=1) if targets.ndim == 2 else targets
                share = (outputs.argmax(dim=1) == labels).double().mean()
                curves.setdefault(f"{name}loss", []).append(loss(outputs, targets).item())
                curves.setdefault(f"{name}accuracy", []).append(share.item())
        if not batches:
            batches = list(torch.randperm(len(x), generator=generator).split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch]), y[batch]))
        optimizer.step()
    return {name: np.array(values) for name, values in curves.items()}
