"""The rules of group and instance normalisation: statistics per sample, one weight per channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import scale_and_shift
from optuna_ttp.ntk.layers._rule import Unsummed


def group_norm(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of scale and shift of group normalisation."""
    module: Any = call.module

    def make() -> torch.Tensor:
        x = call.input[..., None] if call.input.ndim == 2 else call.input
        return functional.group_norm(x, module.num_groups, None, None, module.eps).flatten(2)

    return _by_channel(call, call.cached("normalised", make), cotangents)


def instance_norm(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of scale and shift of instance normalisation."""
    module: Any = call.module

    def make() -> torch.Tensor:
        return functional.instance_norm(call.input, eps=module.eps).flatten(2)

    return _by_channel(call, call.cached("normalised", make), cotangents)


def _by_channel(
    call: Call, normalised: torch.Tensor, cotangents: list[torch.Tensor]
) -> dict[str, Unsummed]:
    """Return rows ``(B, C, k)`` of scale and shift from C cotangents; inputs are ``(B, k, S)``."""
    parts = [t.reshape(normalised.shape) for t in cotangents]
    return scale_and_shift(call, normalised, parts, sum_over=(2,))
