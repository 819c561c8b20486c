"""Tensors in the nested values that modules take and give."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import fields
from dataclasses import is_dataclass
import types
from typing import Any

import torch


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return all tensors in nested sequences, mappings, data classes and name spaces, in order.

    Args:
        value:
            What a module takes or gives. Anything else than these containers holds no tensor.

    Returns:
        The tensors, depth first.
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_of(v)]
    if isinstance(value, types.SimpleNamespace):
        return [t for v in vars(value).values() for t in tensors_of(v)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for f in fields(value) for t in tensors_of(getattr(value, f.name))]
    return []


def map_tree(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor in nested lists, tuples and plain dictionaries.

    Args:
        value:
            Any nesting. Other containers stay as they are: only PyTorch's own output classes are
            rebuilt from their fields.
        function:
            From tensor to tensor.

    Returns:
        The same nesting.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) is dict:
        return {k: map_tree(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        mapped = [map_tree(v, function) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if isinstance(value, Mapping):
        try:
            return type(value)(**{k: map_tree(v, function) for k, v in value.items()})
        except TypeError:
            return value
    return value
