"""The rule of transposed convolutions of one, two and three dimensions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._patches import Patches
from optuna_ttp.ntk.layers._rule import stacked
from optuna_ttp.ntk.layers._rule import trainable_names
from optuna_ttp.ntk.layers._rule import Unsummed


def transposed_convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of a transposed convolution ``y = conv_transpose(x, W)``.

    ``<d, conv_transpose(x, W)> = <conv(d, W), x>``, so that the gradient of ``W`` for a cotangent
    ``d`` is that of a convolution with the inputs ``d`` and the cotangent ``x``.
    """
    names = trainable_names(call)
    contributions: dict[str, Unsummed] = {}
    if "weight" in names:
        contributions["weight"] = _weight(call, cotangents)
    if "bias" in names:
        contributions["bias"] = torch.stack([t.flatten(2).sum(2) for t in cotangents], 1)
    return contributions


def _weight(call: Call, cotangents: list[torch.Tensor]) -> Factors:
    """Return the factors of the weight's gradient: patches of the cotangents, and the inputs."""
    module: Any = call.module
    groups, x = module.groups, call.input
    unfold = Patches(
        kernel=module.kernel_size,
        stride=module.stride,
        dilation=module.dilation,
        padding=tuple(p for p in reversed(module.padding) for _ in (0, 1)),
        mode="constant",
        groups=groups,
        n_positions=tuple(x.shape[2:]),
    )
    unfolded = [unfold(t) for t in cotangents]
    inputs = partial(_grouped, groups=groups)
    # The weight is laid out as (inputs, outputs / groups, kernel): (G, k, o) here.
    n_rows = x.shape[1] // groups
    d = stacked(unfolded, 2)
    return Factors((x,), inputs, (d,), n_rows, transposed=True, caches=(call.cache,))


def _grouped(x: torch.Tensor, *, groups: int) -> torch.Tensor:
    """Turn ``(B, G k, ...)`` into ``(B, G, k, S)``."""
    return x.reshape(len(x), groups, x.shape[1] // groups, -1)
