"""The type of a layer's rule, and functions that several rules share.

A rule computes the gradients of the parameters of one kind of layer. Index conventions: ``b``
samples, ``c`` outputs of the network, ``g`` groups, ``o`` outputs of the layer in a group, ``k``
inputs (fan-in) in a group, ``s`` positions (tokens, pixels).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from typing import TypeAlias

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._patches import patches


Contribution: TypeAlias = "Factors | torch.Tensor"
"""The gradient of one parameter: factors, or rows of shape ``(B, C, p)``."""

Rule: TypeAlias = Callable[[Call, list[torch.Tensor]], dict[str, Contribution]]
"""Takes a call and one cotangent of its output per class; returns gradients by parameter name."""


def trainable_names(call: Call) -> set[str]:
    """Return the names of the module's parameters that are trained."""
    return {name for name, tensor in call.state.items() if tensor.requires_grad}


def weight_and_bias(
    call: Call,
    source: torch.Tensor,
    expand: Callable[[torch.Tensor], torch.Tensor],
    cotangents: torch.Tensor,
    n_rows: int,
    *,
    transposed: bool = False,
) -> dict[str, Contribution]:
    """Return the gradients of ``y_s = W a_s + b`` for cotangents of shape ``(B, G, C, o, S)``.

    ``expand`` computes the inputs ``a`` of shape ``(B, G, k, S)`` from ``source``, and ``n_rows``
    is ``k``. The weight is laid out as ``(G, o, k)``, or as ``(G, k, o)`` with ``transposed``.
    Only trained parameters are in the result: factors of ``"weight"``, rows of ``"bias"``.
    """
    contributions: dict[str, Contribution] = {}
    names = trainable_names(call)
    if "weight" in names:
        contributions["weight"] = Factors(
            (source,), expand, (cotangents,), n_rows, transposed, (call.cache,)
        )
    if "bias" in names:
        # (B, G, C, o) to (B, C, G o)
        contributions["bias"] = cotangents.sum(-1).transpose(1, 2).flatten(2)
    return contributions


def linear_gradients(
    call: Call, cotangents: list[torch.Tensor], *, transposed: bool = False
) -> dict[str, Contribution]:
    """Return gradients of ``y_s = W x_s + b``; with ``transposed`` the weight stores ``W^T``."""
    x = call.input.flatten(1, -2) if call.input.ndim > 2 else call.input[:, None]
    parts = [d.flatten(1, -2) if d.ndim > 2 else d[:, None] for d in cotangents]
    d = stacked([p.transpose(1, 2) for p in parts], 1)[:, None]
    return weight_and_bias(call, x, _tokens, d, x.shape[-1], transposed=transposed)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """Turn ``(B, S, k)`` into ``(B, 1, k, S)``."""
    return x.transpose(1, 2)[:, None]


def convolution_gradients(
    call: Call,
    inputs: torch.Tensor,
    cotangents: list[torch.Tensor],
    padding: tuple[int, ...],
    mode: str,
) -> dict[str, Contribution]:
    """Return the gradients of a module that convolves ``inputs`` with its own weight.

    It is a linear layer on the patches of each group of channels. ``padding`` and ``mode`` are
    those of :func:`torch.nn.functional.pad`, with "zeros" for "constant".
    """
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


def scale_and_shift(
    call: Call,
    normalised: torch.Tensor,
    cotangents: list[torch.Tensor],
    *,
    sum_over: tuple[int, ...],
) -> dict[str, Contribution]:
    """Return the rows of ``y = w x + b``, element by element: ``sum_s d_s x_s``, ``sum_s d_s``.

    ``normalised`` is ``x``, of the shape of each cotangent ``d``; ``sum_over`` are the axes of the
    positions ``s``.
    """

    def rows(values: list[torch.Tensor]) -> torch.Tensor:
        sums = [v.sum(sum_over) if sum_over else v for v in values]
        return torch.stack([s.flatten(1) for s in sums], 1)

    contributions: dict[str, Contribution] = {}
    names = trainable_names(call)
    if "weight" in names:
        contributions["weight"] = rows([d * normalised for d in cotangents])
    if "bias" in names:
        contributions["bias"] = rows(cotangents)
    return contributions


def stacked(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Return the parts, of equal shape, along a new axis; a single part is not copied."""
    return parts[0].unsqueeze(axis) if len(parts) == 1 else torch.stack(parts, axis)
