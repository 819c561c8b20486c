"""The type of a layer's rule, and functions that several rules share.

A rule computes the gradients of the parameters of one kind of layer. Index conventions: ``b``
samples, ``c`` outputs of the network, ``g`` groups, ``o`` outputs of the layer in a group, ``k``
inputs (fan-in) in a group, ``s`` positions (tokens, pixels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import TypeAlias

import torch

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._patches import Patches
from optuna_ttp.ntk.layers._sums import Sums


Contribution: TypeAlias = "Factors | torch.Tensor"
"""The gradient of one parameter: factors, or rows of shape ``(B, C, p)``."""

Unsummed: TypeAlias = "Factors | Sums | torch.Tensor"
"""The gradient of one parameter as a rule gives it, scales and shifts not summed yet."""

Rule: TypeAlias = Callable[[Call, list[torch.Tensor]], dict[str, Unsummed]]
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
) -> dict[str, Unsummed]:
    """Return the gradients of ``y_s = W a_s + b`` for cotangents of shape ``(B, G, C, o, S)``.

    ``expand`` computes the inputs ``a`` of shape ``(B, G, k, S)`` from ``source``, and ``n_rows``
    is ``k``. The weight is laid out as ``(G, o, k)``, or as ``(G, k, o)`` with ``transposed``.
    Only trained parameters are in the result: factors of ``"weight"``, sums of ``"bias"``.
    """
    contributions: dict[str, Unsummed] = {}
    names = trainable_names(call)
    if "weight" in names:
        contributions["weight"] = Factors(
            (source,), expand, (cotangents,), n_rows, transposed, (call.cache,)
        )
    if "bias" in names:
        by_class = cotangents.unbind(2)
        contributions["bias"] = Sums(tuple(d.flatten(1, 2) for d in by_class), None)
    return contributions


def linear_gradients(
    call: Call, cotangents: list[torch.Tensor], *, transposed: bool = False
) -> dict[str, Unsummed]:
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
) -> dict[str, Unsummed]:
    """Return the gradients of a module that convolves ``inputs`` with its own weight.

    It is a linear layer on the patches of each group of channels. ``padding`` and ``mode`` are
    those of :func:`torch.nn.functional.pad`, with "zeros" for "constant".
    """
    module: Any = call.module
    d = stacked([t.flatten(2).unflatten(1, (module.groups, -1)) for t in cotangents], 2)
    unfold = Patches(
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
) -> dict[str, Unsummed]:
    """Return the sums of ``y = w x + b``, by element: ``sum_s d_s x_s`` and ``sum_s d_s``.

    ``normalised`` is ``x``, of the shape of each cotangent ``d``; ``sum_over`` are the axes of the
    positions ``s``.
    """

    def by_weight(values: torch.Tensor) -> torch.Tensor:
        """Move the axes of the positions to the end: ``(B, k, S)``."""
        others = [axis for axis in range(1, values.ndim) if axis not in sum_over]
        moved = values.permute(0, *others, *sum_over)
        return (
            moved.flatten(1, len(others)).flatten(2) if sum_over else values.flatten(1)[..., None]
        )

    contributions: dict[str, Unsummed] = {}
    names = trainable_names(call)
    parts = tuple(by_weight(d) for d in cotangents)
    if "weight" in names:
        contributions["weight"] = Sums(parts, by_weight(normalised))
    if "bias" in names:
        contributions["bias"] = Sums(parts, None)
    return contributions


def stacked(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Return the parts, of equal shape, along a new axis; a single part is not copied."""
    return parts[0].unsqueeze(axis) if len(parts) == 1 else torch.stack(parts, axis)
