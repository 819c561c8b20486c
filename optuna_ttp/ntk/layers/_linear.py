"""The rule of :class:`torch.nn.Linear`, and of the same layer with a transposed weight."""

from __future__ import annotations

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import Contribution
from optuna_ttp.ntk.layers._rule import stacked
from optuna_ttp.ntk.layers._rule import weight_and_bias


def linear(
    call: Call, cotangents: list[torch.Tensor], *, transposed: bool = False
) -> dict[str, Contribution]:
    """Return the gradients of ``y_s = W x_s + b``; with ``transposed`` the weight is ``W^T``."""
    x = call.input.flatten(1, -2) if call.input.ndim > 2 else call.input[:, None]
    parts = [d.flatten(1, -2) if d.ndim > 2 else d[:, None] for d in cotangents]
    d = stacked([p.transpose(1, 2) for p in parts], 1)[:, None]
    return weight_and_bias(call, x, _tokens, d, x.shape[-1], transposed=transposed)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """Turn ``(B, S, k)`` into ``(B, 1, k, S)``."""
    return x.transpose(1, 2)[:, None]
