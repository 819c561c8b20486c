"""Running a module with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch


def functional_call(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Run a module with other tensors in the place of some of its parameters and buffers.

    As :func:`torch.func.functional_call`, which leaves a module that is registered under two names
    with the other tensors in the place of its parameters: it takes them for two, and puts back
    for the second one what it has put in for the first.

    Args:
        module:
            The module. It is as before afterwards.
        state:
            The tensors, by one of the names of what they stand for; what has several gets them
            everywhere.
        args:
            Of the module.
        kwargs:
            Of the module. None by default.

    Returns:
        What the module returns.
    """
    slots: dict[int, list[str]] = {}
    for name, tensor in _slots(module):
        slots.setdefault(id(tensor), []).append(name)
    named = dict(
        chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
    )
    placed = {slot: value for name, value in state.items() for slot in slots[id(named[name])]}
    return torch.func.functional_call(module, placed, args, kwargs, tie_weights=False)


def _slots(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every place that holds a parameter or buffer, once, under the first of its names."""
    for prefix, part in module.named_modules():
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor
