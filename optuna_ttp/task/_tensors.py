"""Tensors in nested inputs: mapping, casting, checking and describing them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch


def cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Move a tensor to a device, and cast it to a dtype if it is a floating-point one."""
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor in nested mappings and sequences; the nesting stays."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        mapped = [map_tensors(v, function) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def check_inputs(inputs: Any, n_read: int) -> None:
    """Raise TypeError or ValueError where a batch is complex or not finite.

    ``n_read`` is the number of the batch's first sample.
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
    """Raise ValueError where a tensor is on the meta device; ``what`` begins the message."""

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
    """Return shapes without the axis of samples, types, and the range of integers, as a text."""
    parts: list[str] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 0:
            values = kind
        else:
            values = f"{kind}, from {int(tensor.min())} to {int(tensor.max())}"
        parts.append(f"shape {tuple(tensor.shape[1:])} a sample ({values})")
        return tensor

    map_tensors(inputs, add)
    return ", ".join(parts) or type(inputs).__name__
