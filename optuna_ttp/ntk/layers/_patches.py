"""The patches of its inputs that a convolution multiplies with its weight."""

from __future__ import annotations

from dataclasses import dataclass
import math

import torch
import torch.nn.functional as functional


@dataclass(frozen=True)
class Patches:
    """The patches of its inputs that a convolution with these settings multiplies.

    ``padding`` and ``mode`` are those of :func:`torch.nn.functional.pad`, with "zeros" for
    "constant". There may be any number of axes of positions. If ``n_positions`` gives the number
    of output positions along each axis, the inputs are padded at their ends to give as many.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    groups: int
    n_positions: tuple[int, ...] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the patches ``(B, G, k, S)`` of inputs ``(B, G channels, ...)``."""
        view = self._view(x)
        batch, channels = view.shape[:2]
        return view.reshape(batch, self.groups, channels // self.groups * self._area, -1)

    def picked(self, x: torch.Tensor, group: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return rows ``row`` of the patches of groups ``group``, both ``(m,)``: ``(B, m, S)``.

        The other patches are not computed.
        """
        channel = group * (x.shape[1] // self.groups) + row // self._area
        plain = self._area == 1 and set(self.stride) == {1} and not any(self.padding)
        if plain and self.n_positions is None:
            return channels_at(x.flatten(2), channel)
        offsets: list[torch.Tensor] = []
        rest = row % self._area
        for length in reversed(self.kernel):
            offsets.insert(0, rest % length)
            rest = rest // length
        # An index behind a slice would put the picked axis first.
        where: tuple[slice | torch.Tensor, ...] = (slice(None), channel, *offsets)
        return self._view(x)[where].flatten(2)

    @property
    def _area(self) -> int:
        """The number of weights per channel."""
        return math.prod(self.kernel)

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view of the (padded) inputs, ``(B, channels, kernel..., positions...)``."""
        if any(self.padding):
            mode = "constant" if self.mode == "zeros" else self.mode
            x = functional.pad(x, self.padding, mode=mode)
        if self.n_positions is not None:
            # The output padding of a transposed convolution adds positions at the end.
            needed = [
                (n - 1) * s + (k - 1) * d + 1
                for n, s, k, d in zip(
                    self.n_positions, self.stride, self.kernel, self.dilation, strict=True
                )
            ]
            ends = [n - have for n, have in zip(needed, x.shape[2:], strict=True)]
            if any(ends):
                x = functional.pad(x, [v for e in reversed(ends) for v in (0, e)])
        n_axes = len(self.kernel)
        # One copy is several times as fast as torch.nn.functional.unfold.
        x = x.contiguous()
        settings = zip(self.kernel, self.stride, self.dilation, strict=True)
        for axis, (k, s, d) in enumerate(settings, 2):
            x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
        # (B, channels, positions..., kernel...)
        order = (0, 1, *range(2 + n_axes, 2 + 2 * n_axes), *range(2, 2 + n_axes))
        return x.permute(order)


def channels_at(values: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Return the picked channels ``(B, m, S)`` of values ``(B, k, S)``.

    Values that are laid out channels last are gathered in that layout, which is several times as
    fast as any copy.
    """
    if values.shape[2] == 1 or values.stride(1) != 1:
        return values.index_select(1, picked)
    batch, n_channels, positions = values.shape
    flat = values.transpose(1, 2).reshape(batch * positions, n_channels)
    gathered: torch.Tensor = flat.index_select(1, picked).unflatten(0, (batch, positions))
    return gathered.transpose(1, 2)
