"""The rules of layer and RMS normalisation: statistics per token, one weight per element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import scale_and_shift
from optuna_ttp.ntk.layers._rule import Unsummed


def layer_norm(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of scale and shift of layer normalisation."""
    return _by_element(functional.layer_norm, call, cotangents)


def rms_norm(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradient of the scale of RMS normalisation, which PyTorch has from 2.4 on."""
    return _by_element(functional.rms_norm, call, cotangents)


def _by_element(
    normalise: Callable[..., torch.Tensor], call: Call, cotangents: list[torch.Tensor]
) -> dict[str, Unsummed]:
    """Return the gradients of one scale and one shift per element of the normalised axes."""
    module: Any = call.module
    shape = tuple(module.normalized_shape)
    normalised = call.cached("normalised", lambda: normalise(call.input, shape, eps=module.eps))
    lead = tuple(range(1, call.input.ndim - len(shape)))
    return scale_and_shift(call, normalised, cotangents, sum_over=lead)
