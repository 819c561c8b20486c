"""The rule of the linear layer that the transformers library calls ``Conv1D``."""

from __future__ import annotations

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import linear_gradients
from optuna_ttp.ntk.layers._rule import Unsummed


def is_transformers_conv1d(module: torch.nn.Module) -> bool:
    """Return whether a module is ``Conv1D`` of transformers, which need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def transformers_conv1d(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of a linear layer whose weight is laid out as (inputs, outputs)."""
    return linear_gradients(call, cotangents, transposed=True)
