"""One call of a layer, as the tape recorded it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from optuna_ttp.task import tensors_of


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module for a batch of ``B`` samples.

    Arguments are detached, and copies with ``is_copied``, because the module or a later operation
    writes to them; ``versions`` says how often each of their tensors had been written to before
    the call. ``state`` are the module's parameters and buffers before the call. ``positions`` says
    which of the tensors in the output carry a gradient, ``shapes`` and ``edges`` their shapes and
    where their gradients flow: captured at once, because an activation that works in place would
    otherwise change what is differentiated. ``cache`` holds what rules make of the inputs alone,
    so that it is made once for all classes.
    """

    module: torch.nn.Module
    batch_size: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, torch.Tensor]
    positions: tuple[int, ...]
    edges: tuple[GradientEdge, ...]
    shapes: tuple[torch.Size, ...]
    versions: tuple[int, ...]
    is_copied: bool
    cache: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def _tensors(self) -> list[torch.Tensor]:
        return tensors_of((self.args, self.kwargs))

    @property
    def input(self) -> torch.Tensor:
        """Return the first tensor among the arguments, in the precision of the parameters."""
        first = self._tensors[0]
        return first.to(self.dtype) if first.is_floating_point() else first

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the precision of the parameters; activations under autocast may differ."""
        return next(t.dtype for t in self.state.values() if t.requires_grad)

    @property
    def is_intact(self) -> bool:
        """Return whether neither the module nor later operations have written to the arguments."""
        return tuple(t._version for t in self._tensors) == self.versions

    def cached(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what ``make`` returns, which is called the first time that a key is asked for."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]
