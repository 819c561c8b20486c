"""Spectra with columns of the Jacobian, from plain automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.spectrum import SampledJacobian
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask


def rows_of(model: torch.nn.Module, inputs: torch.Tensor) -> NDArray[np.float64]:
    """The Jacobian ``(N C, D)`` of the outputs by all trainable weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = model(inputs).flatten()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
        for o in outputs
    ]
    return torch.stack(rows).double().numpy()


@cache
def _rows_and_weights(
    task: FineTuningTask,
) -> tuple[NDArray[np.float64], dict[str, torch.Tensor]]:
    model = copy.deepcopy(task.model).double().eval()
    rows = rows_of(model, task._dataset.tensors[0].double())
    return rows, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def with_columns(
    spectrum: Spectrum, task: FineTuningTask, n_columns: float = np.inf, seed: int = 0
) -> Spectrum:
    """The spectrum with about so many sampled columns, by default all."""
    jacobian, named = _rows_and_weights(task)
    counts = np.array([p.numel() for p in named.values()])
    flat = np.concatenate([p.flatten().numpy() for p in named.values()])
    share = np.abs(jacobian).mean(axis=0)
    probability = np.ones(len(share))
    if n_columns < len(share):
        probability = np.minimum(1.0, n_columns * share / share.sum())
    picked = np.flatnonzero(np.random.default_rng(seed).random(len(share)) < probability)
    columns = jacobian[:, picked]
    parameters = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    sampled = SampledJacobian(
        codes=columns,
        scales=np.ones(len(picked), dtype=np.float32),
        inflation=1.0 / probability[picked],
        weights=flat[picked],
        parameters=parameters[picked],
        positions=picked - starts[parameters[picked]],
        names=tuple(named),
        n_weights=counts,
    )
    outputs = (jacobian @ flat).reshape(spectrum.initial_outputs.shape)
    return replace(spectrum, jacobian=sampled, weight_outputs=outputs)


def train(
    task: FineTuningTask,
    loss: torch.nn.Module,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    batch_size: int,
    n_steps: int,
    max_grad_norm: float | None = None,
    accumulation_steps: int = 1,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    seed: int = 3,
) -> NDArray[np.float64]:
    """Losses over all samples before every step of a real training by an optimiser of PyTorch."""
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    real = optimizer(model)
    advance = None if scheduler is None else scheduler(real)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    batches: list[torch.Tensor] = []
    for _ in range(n_steps + 1):
        with torch.no_grad():
            losses.append(loss(model(x), y).item())
        if not batches:
            order = torch.arange(len(x))
            if batch_size < len(x):
                order = torch.randperm(len(x), generator=generator)
            batches = list(order.split(batch_size))
        together, batches = batches[:accumulation_steps], batches[accumulation_steps:]
        real.zero_grad()
        for batch in together:
            torch.autograd.backward(loss(model(x[batch]), y[batch]) / len(together))
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        real.step()
        if advance is not None:
            advance.step()
    return np.array(losses)
