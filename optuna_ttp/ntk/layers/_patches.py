"""The patches of its inputs that a convolution multiplies with its weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional


def patches(
    x: torch.Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    mode: str,
    groups: int,
    n_positions: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Return the patches of inputs ``(B, G channels, ...)`` as ``(B, G, channels kernel, S)``.

    There may be any number of axes of positions. If ``n_positions`` gives the number of output
    positions along each axis, the inputs are padded at their ends to give as many.
    """
    if any(padding):
        x = functional.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    if n_positions is not None:
        # The output padding of a transposed convolution adds positions at the end.
        needed = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(n_positions, stride, kernel, dilation, strict=True)
        ]
        ends = [n - have for n, have in zip(needed, x.shape[2:], strict=True)]
        if any(ends):
            x = functional.pad(x, [v for e in reversed(ends) for v in (0, e)])
    n_axes = len(kernel)
    # One copy is several times as fast as torch.nn.functional.unfold.
    x = x.contiguous()
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
    # (B, channels, positions..., kernel...)
    order = (0, 1, *range(2 + n_axes, 2 + 2 * n_axes), *range(2, 2 + n_axes))
    x = x.permute(order)
    batch, channels = x.shape[:2]
    return x.reshape(batch, groups, channels // groups * math.prod(kernel), -1)
