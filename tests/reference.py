"""The Jacobian by one backward pass an output, in double precision, without the package."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from tests.cases import Case


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return type(value)(map(_double, value)) if isinstance(value, list | tuple) else value


def collated(data: Any) -> tuple[Any, torch.Tensor]:
    """All samples as one batch: inputs as the model takes them, and targets."""
    if isinstance(data, tuple):
        return data
    batch = torch.utils.data.default_collate([data[i] for i in range(len(data))])
    if isinstance(batch, dict):
        return batch, batch.pop("labels")
    *inputs, targets = batch
    return tuple(inputs), targets


def outputs_of(case: Case, model: torch.nn.Module) -> torch.Tensor:
    """The outputs of all samples at once, made without the package."""
    inputs, _ = collated(case.data)
    if next(model.parameters()).dtype == torch.float64:
        inputs = _double(inputs)
    if case.forward is not None:
        return case.forward(model, inputs)
    if isinstance(inputs, dict):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    logits: torch.Tensor = getattr(outputs, "logits", outputs)
    return logits


def brute_force_jacobian(case: Case) -> NDArray[np.float64]:
    """Rows of the Jacobian by one backward pass an output, in double precision."""
    model = copy.deepcopy(case.model).double().eval()
    outputs = outputs_of(case, model)
    rows = []
    for value in outputs.flatten():
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(value, retain_graph=True)
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for p in model.parameters()
            if p.requires_grad
        ]
        rows.append(torch.cat([g.flatten() for g in gradients]).numpy())
    return np.array(rows)


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
