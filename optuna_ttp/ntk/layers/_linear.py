"""The rule of :class:`torch.nn.Linear`."""

from __future__ import annotations

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import linear_gradients
from optuna_ttp.ntk.layers._rule import Unsummed


def linear(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of a linear layer, whose weight is laid out as (outputs, inputs)."""
    return linear_gradients(call, cotangents)
