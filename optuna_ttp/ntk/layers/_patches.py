"""The patches of its inputs that a convolution sees."""

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
    """Return the patches that a convolution sees, ``(B, G, channels kernel, S)``.

    The inputs ``(B, G channels, ...)`` have any number of axes of positions. ``n_positions`` says
    how many positions there are along each of them where the inputs must be padded at their ends.
    """
    if any(padding):
        x = functional.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    if n_positions is not None:
        # A transposed convolution's output padding lets outputs hang over at the end.
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
