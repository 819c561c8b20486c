"""The rule of convolutions of one, two and three dimensions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._patches import patches
from optuna_ttp.ntk.layers._rule import Contribution
from optuna_ttp.ntk.layers._rule import stacked
from optuna_ttp.ntk.layers._rule import weight_and_bias


def convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """Return the gradients of a linear layer on patches, for each group of channels."""
    module: Any = call.module
    padding = tuple(module._reversed_padding_repeated_twice)
    return convolution_of(call, call.input, cotangents, padding, module.padding_mode)


def convolution_of(
    call: Call,
    inputs: torch.Tensor,
    cotangents: list[torch.Tensor],
    padding: tuple[int, ...],
    mode: str,
) -> dict[str, Contribution]:
    """Return the gradients of a module that convolves ``inputs``, padded, with its own weight."""
    module: Any = call.module
    d = stacked([t.flatten(2).unflatten(1, (module.groups, -1)) for t in cotangents], 2)
    unfold = partial(
        patches,
        kernel=module.kernel_size,
        stride=tuple(module.stride),
        dilation=module.dilation,
        padding=padding,
        mode=mode,
        groups=module.groups,
    )
    return weight_and_bias(call, inputs, unfold, d, call.state["weight"][0].numel())
