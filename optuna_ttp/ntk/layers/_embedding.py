"""The rule of :class:`torch.nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._rule import stacked
from optuna_ttp.ntk.layers._rule import Unsummed


def embedding(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradient of ``y_s = W[i_s]``, a linear layer whose inputs are one-hot."""
    module: Any = call.module
    ids = call.input.flatten(1) if call.input.ndim > 1 else call.input[:, None]
    parts = [t.flatten(1, -2) if t.ndim > 2 else t[:, None] for t in cotangents]
    d = stacked([p.transpose(1, 2) for p in parts], 1)[:, None]
    if module.padding_idx is not None:
        d = d * (ids != module.padding_idx)[:, None, None, None]
    n_rows = len(call.state["weight"])
    return {"weight": Factors((ids,), None, (d,), n_rows, caches=(call.cache,))}
