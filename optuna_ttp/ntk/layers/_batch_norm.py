"""The rule of batch normalisation with frozen statistics, of any number of dimensions."""

from __future__ import annotations

from typing import Any

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import scale_and_shift
from optuna_ttp.ntk.layers._rule import Unsummed


def batch_norm(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return gradients of ``w`` and ``b`` in ``y = w (x - mean) / sqrt(variance + eps) + b``."""
    module: Any = call.module
    x = call.input.flatten(2) if call.input.ndim > 2 else call.input[..., None]
    state = call.state

    def make() -> torch.Tensor:
        scale = (state["running_var"] + module.eps).rsqrt()
        normalised: torch.Tensor = (x - state["running_mean"][:, None]) * scale[:, None]
        return normalised

    normalised = call.cached("normalised", make)
    parts = [t.flatten(2) if t.ndim > 2 else t[..., None] for t in cotangents]
    return scale_and_shift(call, normalised, parts, sum_over=(2,))
