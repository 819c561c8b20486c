"""Other libraries' ways to the empirical NTK, each as its documentation has it.

Every function takes a model in evaluation mode and inputs and returns the kernel of shape
``(N C, N C)`` with row ``n C + c`` for output ``c`` of sample ``n``. Libraries are imported
inside, because each is only needed for its own measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch


Gram = NDArray[np.floating[Any]]


def torch_func(model: torch.nn.Module, inputs: torch.Tensor, *, chunk_size: int = 16) -> Gram:
    """``vmap(jacrev(f))`` in chunks of samples, one matrix product at the end.

    Args:
        model:
            The network.
        inputs:
            One sample a row.
        chunk_size:
            Samples that are vectorised over together.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def single(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = torch.func.functional_call(model, weights, (x[None],))
        return outputs[0]

    jacobian = torch.func.jacrev(single)
    parts = torch.func.vmap(jacobian, (None, 0), chunk_size=chunk_size)(parameters, inputs)
    rows = torch.cat([j.flatten(2) for j in parts.values()], 2).flatten(0, 1)
    return np.asarray((rows @ rows.T).numpy())


def torch_func_by_parameter(model: torch.nn.Module, inputs: torch.Tensor) -> Gram:
    """The tutorial on neural tangent kernels: all samples at once, contracted by parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def single(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = torch.func.functional_call(model, weights, (x[None],))
        return outputs[0]

    parts = torch.func.vmap(torch.func.jacrev(single), (None, 0))(parameters, inputs)
    rows = [j.flatten(2) for j in parts.values()]
    gram: Any = sum(torch.einsum("naf,mbf->namb", j, j) for j in rows)
    size = gram.shape[0] * gram.shape[1]
    return np.asarray(gram.reshape(size, size).numpy())


class _FrozenNorm(torch.nn.Module):
    """Batch norm with frozen statistics as plain arithmetic: TorchJD refuses the real one."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.weight = torch.nn.Parameter(norm.weight.detach().clone())
        self.bias = torch.nn.Parameter(norm.bias.detach().clone())
        self.register_buffer("mean", norm.running_mean.clone())
        self.register_buffer("scale", (norm.running_var + norm.eps).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised = (x - self.mean[:, None, None]) * self.scale[:, None, None]
        outputs: torch.Tensor = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return outputs


def without_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    """Replace batch norm by the same arithmetic, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, torch.nn.BatchNorm2d):
            setattr(model, name, _FrozenNorm(child))
        else:
            without_batch_norm(child)
    return model


def torchjd(model: torch.nn.Module, inputs: torch.Tensor) -> Gram:
    """TorchJD's Gramian engine."""
    from torchjd.autogram import Engine

    model = without_batch_norm(model)
    engine = Engine(model, batch_dim=0)
    outputs = model(inputs)
    gramian = engine.compute_gramian(outputs)
    size = outputs.numel()
    return np.asarray(gramian.detach().reshape(size, size).numpy())


KERNELS: dict[str, Callable[[torch.nn.Module, torch.Tensor], Gram]] = {
    "torch_func": torch_func,
    "torch_func_by_parameter": torch_func_by_parameter,
    "torchjd": torchjd,
}
