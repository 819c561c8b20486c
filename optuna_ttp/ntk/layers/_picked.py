"""Picked columns of a gradient that is stored as factors, without the other columns."""

from __future__ import annotations

from dataclasses import replace

import torch

from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._patches import channels_at
from optuna_ttp.ntk.layers._patches import Patches
from optuna_ttp.ntk.layers._rules import PRODUCTS


def picked_columns(factors: Factors, picked: torch.Tensor) -> torch.Tensor:
    """Return the columns ``(B, C, m)`` of the flattened weights ``picked``, ``(m,)``.

    An entry of weight ``(o, k)`` is the product of cotangent ``o`` and input ``k``, summed over
    positions. If more than about one weight in thirty is picked, all are computed: a product of
    matrices makes some thirty entries in the time in which one is gathered.
    """
    if factors.expand is None:
        return _of_table(factors, picked)
    groups, _, width, _, n_rows = factors.shape
    # A product of thin matrices moves as much memory as a gather does.
    cost = min(PRODUCTS.gather_cost, 2 * width)
    if len(picked) * cost >= groups * width * n_rows:
        return _of_product(factors, picked)
    return _gathered(factors, picked)


def _of_product(factors: Factors, picked: torch.Tensor) -> torch.Tensor:
    """Return picked columns of the whole gradient, which is computed a few samples at a time."""
    groups, classes, width, _, n_rows = factors.shape
    inputs = factors.inputs()
    n_samples = len(factors.cotangents[0])
    step = max(1, PRODUCTS.scratch // (groups * classes * width * n_rows))
    parts = []
    for start in range(0, n_samples, step):
        some = factors.of(slice(start, start + step))
        some = replace(some, caches=tuple({"inputs": a[start : start + step]} for a in inputs))
        parts.append(some.rows().index_select(2, picked))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gathered(factors: Factors, picked: torch.Tensor) -> torch.Tensor:
    """Return picked columns as sums over positions of gathered cotangents times inputs."""
    groups, classes, width, _, n_rows = factors.shape
    if factors.transposed:
        inputs_of, outputs_of = picked // width % n_rows, picked % width
    else:
        inputs_of, outputs_of = picked % n_rows, picked // n_rows % width
    group = picked // (n_rows * width)
    n_samples = len(factors.cotangents[0])
    total: torch.Tensor | None = None
    for call, cotangent in enumerate(factors.cotangents):
        d = cotangent.transpose(1, 2).reshape(n_samples * classes, groups * width, -1)
        left = channels_at(d, group * width + outputs_of).unflatten(0, (n_samples, classes))
        right = _inputs_at(factors, call, group, inputs_of)
        part = (left * right[:, None]).sum(-1)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _inputs_at(
    factors: Factors, call: int, group: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """Return the inputs ``(B, m, S)`` of one call at rows of groups, both ``(m,)``.

    They are the same for all outputs of the network, for which the cache of the call keeps them.
    """
    cache = factors.caches[call]
    if "picked inputs" not in cache:
        if isinstance(factors.expand, Patches):
            picked = factors.expand.picked(factors.sources[call], group, row)
        else:
            inputs = factors.inputs()[call].flatten(1, 2)
            picked = channels_at(inputs, group * factors.n_rows + row)
        cache["picked inputs"] = picked
    return cache["picked inputs"]


def _of_table(factors: Factors, picked: torch.Tensor) -> torch.Tensor:
    """Return picked columns of a table that integers index.

    A weight ``(row, o)`` gets the sum of cotangents ``o`` at the positions that index its row.
    """
    width = factors.shape[2]
    rows, place = torch.unique(picked // width, return_inverse=True)
    outputs_of = picked % width
    total: torch.Tensor | None = None
    for ids, cotangent in zip(factors.sources, factors.cotangents, strict=True):
        # (B, S, R): whether a position indexes a picked row
        hits = (ids[:, :, None] == rows).to(cotangent)
        sums = cotangent[:, 0].flatten(1, 2) @ hits
        part = sums.unflatten(1, cotangent.shape[2:4])[:, :, outputs_of, place]
        total = part if total is None else total + part
    assert total is not None
    return total
