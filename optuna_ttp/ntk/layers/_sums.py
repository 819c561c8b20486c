"""Gradients of scales and shifts as sums over positions, computed for the weights that count."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optuna_ttp.ntk.layers._patches import channels_at


@dataclass(frozen=True, eq=False)
class Sums:
    """The gradient ``G[n, c, k] = sum_s D_c[n, k, s] X[n, k, s]`` of a vector, not summed up.

    ``cotangents`` has one tensor ``D_c`` of shape ``(B, k, S)`` per output of the network;
    ``inputs`` are ``X``, of that shape, or None for a shift, where they are one.
    """

    cotangents: tuple[torch.Tensor, ...]
    inputs: torch.Tensor | None

    def rows(self) -> torch.Tensor:
        """Return the gradient, of shape ``(B, C, k)``."""
        parts = [d if self.inputs is None else d * self.inputs for d in self.cotangents]
        return torch.stack([p.sum(-1) for p in parts], 1)

    def columns(self, picked: torch.Tensor) -> torch.Tensor:
        """Return the columns ``(B, C, m)`` of the weights ``picked``, ``(m,)``."""
        inputs = None if self.inputs is None else channels_at(self.inputs, picked)
        some = tuple(channels_at(d, picked) for d in self.cotangents)
        return Sums(some, inputs).rows()
