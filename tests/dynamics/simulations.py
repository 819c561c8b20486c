"""What tests of simulated training share: real training, and shorter calls of `simulate`."""

from __future__ import annotations

from collections.abc import Callable
import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask


Torch = Callable[[torch.optim.Optimizer], Any]

LOSSES = {
    "cross-entropy": torch.nn.CrossEntropyLoss(),
    "weighted and smoothed": torch.nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
    ),
    "mse": torch.nn.MSELoss(),
}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "dampening without momentum": {"momentum": 0.0, "dampening": 0.4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"momentum": 0.0, "weight_decay": 0.3},
    "momentum and weight decay": {"momentum": 0.8, "weight_decay": 0.3},
    "dampening and weight decay": {"momentum": 0.8, "dampening": 0.7, "weight_decay": 0.3},
    "nesterov and weight decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.3},
}


def double(one: Spectrum) -> LinearisedModel:
    return LinearisedModel.from_spectrum(one, dtype=torch.float64)


def stable_rate(one: Spectrum, momentum: float = 0.0) -> float:
    return 2.0 * (1.0 + momentum) / float(double(one).curvatures[0])


def simulate_all(
    model: LinearisedModel,
    learning_rate: float | list[float],
    batch_size: int | list[int],
    momentum: float | list[float] = 0.0,
    max_steps: int | list[int] = 50,
    **settings: Any,
) -> Trajectories:
    rate, batch, momenta, steps = np.broadcast_arrays(
        *map(np.atleast_1d, (learning_rate, batch_size, momentum, max_steps))
    )
    return simulate(
        model,
        SGDConfigurations.of(rate, momenta),
        batch.astype(np.int64),
        max_steps=steps.astype(np.int64),
        **settings,
    )


def train(
    task: FineTuningTask,
    loss: torch.nn.Module,
    batch_size: int,
    n_steps: int = 40,
    *,
    groups: dict[str, float] | None = None,
    scheduler: Torch | None = None,
    every_epoch: bool = False,
    sampling: str = "shuffle",
    seed: int = 3,
    learning_rate: float = 0.02,
    **settings: Any,
) -> NDArray[np.float64]:
    """Losses over all samples before every step of a real training by torch.optim.SGD."""
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    factors = {name: (groups or {}).get(name, 1.0) for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": factors[n] * learning_rate} for n, p in model.named_parameters()],
        learning_rate,
        **settings,
    )
    advance = None if scheduler is None else scheduler(optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    batches: list[torch.Tensor] = []
    for step in range(n_steps + 1):
        with torch.no_grad():
            losses.append(loss(model(x), y).item())
        if not batches:
            if advance is not None and every_epoch and step:
                advance.step()
            if batch_size == len(x) and sampling == "shuffle":
                order = torch.arange(len(x))
            elif sampling == "shuffle":
                order = torch.randperm(len(x), generator=generator)
            else:
                order = torch.randint(len(x), (len(x),), generator=generator)
            batches = list(order.split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch]), y[batch]))
        optimizer.step()
        if advance is not None and not every_epoch:
            advance.step()
    return np.array(losses)


def simulated(
    model: LinearisedModel,
    batch_size: int,
    n_steps: int = 40,
    *,
    learning_rate: float = 0.02,
    schedule: Schedule | None = None,
    target: Target | None = None,
    exact: bool = True,
    sampling: Any = "shuffle",
    growth: KernelGrowth | None = None,
    **sgd: Any,
) -> Trajectories:
    return simulate(
        model,
        SGDConfigurations.of(learning_rate, schedule=schedule, **sgd),
        np.array([batch_size]),
        max_steps=np.array([n_steps]),
        target=target,
        exact=exact,
        sampling=sampling,
        growth=growth,
        seed=3,
    )


def assert_follows(curves: Trajectories, losses: NDArray[np.float64], rtol: float) -> None:
    steps = curves.steps[0].astype(int)
    assert steps[-1] == len(losses) - 1
    assert curves.strides[0] == 1
    np.testing.assert_allclose(curves.curves["loss"][0], losses[steps], rtol=rtol)
