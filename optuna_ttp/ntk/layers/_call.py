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

    Arguments are detached; with ``is_copied`` they are copies, because the module or a later
    operation writes to the originals. ``versions`` are the version counters of their tensors
    before the call. ``state`` are the module's parameters and buffers before the call.
    ``positions`` are the indices of the output tensors that carry a gradient, ``shapes`` and
    ``edges`` their shapes and edges of the autograd graph, captured at once because an in-place
    activation would replace them. ``cache`` holds tensors that depend on the inputs alone, so that
    rules compute them once for all classes.
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
        """The tensors among the arguments, in order."""
        return tensors_of((self.args, self.kwargs))

    @property
    def input(self) -> torch.Tensor:
        """Return the first tensor among the arguments, in the precision of the parameters."""
        first = self._tensors[0]
        return first.to(self.dtype) if first.is_floating_point() else first

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the precision of the trained parameters; activations may have another."""
        return next(t.dtype for t in self.state.values() if t.requires_grad)

    @property
    def is_intact(self) -> bool:
        """Return whether no operation has written to the arguments since the call."""
        return tuple(t._version for t in self._tensors) == self.versions

    def cached(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor stored under ``key``; ``make()`` computes it at the first request."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]
