"""Listing, mapping, casting and checking of tensors in nested inputs and outputs of modules."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import fields
from dataclasses import is_dataclass
import types
from typing import Any

import torch


def cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on a device, cast to ``dtype`` if it is a floating-point tensor."""
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return all tensors in nested sequences, mappings, data classes and name spaces, in order.

    Other containers are not searched.
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


def map_tensors(
    value: Any, function: Callable[[torch.Tensor], torch.Tensor], *, keep_types: bool = False
) -> Any:
    """Return the same nesting of mappings and sequences with a function applied to each tensor.

    Mappings become dictionaries. With ``keep_types`` they are rebuilt in their own class, as
    PyTorch's and transformers' output classes allow; those that cannot be rebuilt are returned
    without the function applied.
    """

    def mapped(part: Any) -> Any:
        return map_tensors(part, function, keep_types=keep_types)

    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        parts = {k: mapped(v) for k, v in value.items()}
        if type(value) is dict or not keep_types:
            return parts
        try:
            return type(value)(**parts)
        except TypeError:
            return value
    if isinstance(value, list | tuple):
        items = [mapped(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def check_inputs(inputs: Any, n_read: int) -> None:
    """Raise TypeError if a batch is complex, ValueError if it is not finite.

    ``n_read`` is the number of the batch's first sample, for the message.
    """

    def check(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            raise TypeError(
                f"The inputs must be real but got {tensor.dtype}. Pass torch.view_as_real of "
                "them, and torch.view_as_complex in the model or forward=."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            finite = torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)
            place = n_read + int((~finite).nonzero()[0])
            raise ValueError(
                f"The inputs must be finite but got NaN or infinity in sample {place}."
            )
        return tensor

    map_tensors(inputs, check)


def check_numbers(what: str, value: Any) -> None:
    """Raise ValueError if a tensor in ``value``, named ``what``, is on the meta device."""

    def check(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            raise ValueError(
                f"{what} must hold numbers but got a tensor on the meta device, which has none. "
                "Load them first: load_state_dict(..., assign=True), or from_pretrained without "
                "offloading."
            )
        return tensor

    map_tensors(value, check)


def describe_inputs(inputs: Any) -> str:
    """Return a text of each tensor's shape per sample, its type, and the range of integers."""
    parts: list[str] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 0:
            values = kind
        else:
            values = f"{kind}, from {int(tensor.min())} to {int(tensor.max())}"
        parts.append(f"shape {tuple(tensor.shape[1:])} per sample ({values})")
        return tensor

    map_tensors(inputs, add)
    return ", ".join(parts) or type(inputs).__name__
