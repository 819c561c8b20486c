"""Tensors in nested inputs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch


def cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Move a tensor; a floating-point one is also cast.

    Args:
        tensor:
            Any tensor.
        device:
            Where it goes.
        dtype:
            What it is cast to.

    Returns:
        The same tensor where nothing is to be done.
    """
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor in nested mappings and sequences.

    Args:
        value:
            Any nesting; what is no tensor stays as it is.
        function:
            From tensor to tensor.

    Returns:
        The same nesting.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        mapped = [map_tensors(v, function) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value
