"""The rule of convolutions of one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import convolution_gradients
from optuna_ttp.ntk.layers._rule import Unsummed


def convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of the weight and the bias of a convolution."""
    module: Any = call.module
    padding = tuple(module._reversed_padding_repeated_twice)
    return convolution_gradients(call, call.input, cotangents, padding, module.padding_mode)
