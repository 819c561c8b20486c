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

    ``state`` has the other tensors by the name of what they replace. A parameter that has several
    names is replaced under all of them, whichever is given. The module is as before afterwards,
    unlike with :func:`torch.func.functional_call`: that takes a module registered under two names
    for two, and leaves the second with the other tensors.
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
    """Yield ``(name, tensor)`` once for each module's attribute that is a parameter or buffer."""
    for prefix, part in module.named_modules():
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor
