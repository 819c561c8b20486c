"""Filters that smooth mini-batch losses before they are compared with the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


@dataclass(frozen=True)
class Smoothing:
    """A filter that smooths mini-batch losses before they are compared with the target.

    Training time is the first step at which the smoothed loss is at the target (Zancato et al.,
    NeurIPS 2020, section 5, which leaves the filter open). A smoothed curve lags behind, and a
    noisy one crosses earlier than its mean: so the simulated curve gets the same filter.

    Made by :meth:`moving_average` or :meth:`exponential`.

    Attributes:
        kind:
            ``"moving_average"`` or ``"exponential"``.
        width:
            The number of losses in the moving average, or the weight of the past in [0, 1).
    """

    kind: Literal["moving_average", "exponential"]
    width: float

    def __post_init__(self) -> None:
        if self.kind not in ("moving_average", "exponential"):
            raise ValueError(f"The kind of smoothing {self.kind!r} is not known.")
        if self.kind == "moving_average" and not (self.width >= 1 and self.width % 1 == 0):
            raise ValueError(f"The window must be a positive integer but got {self.width!r}.")
        if self.kind == "exponential" and not 0.0 <= self.width < 1.0:
            raise ValueError(f"The weight of the past must be in [0, 1) but got {self.width!r}.")

    @classmethod
    def moving_average(cls, window: int) -> Smoothing:
        """Return the filter that takes the mean of the last ``window`` losses, at first of fewer.

        Args:
            window:
                The number of losses, at least one, which leaves the losses as they are.

        Returns:
            The filter.
        """
        return cls("moving_average", window)

    @classmethod
    def exponential(cls, weight: float) -> Smoothing:
        """Return the filter ``s_t = w s_(t-1) + (1 - w) l_t`` that starts at ``l_0``.

        Args:
            weight:
                The weight ``w`` of the past, in [0, 1).

        Returns:
            The filter.
        """
        return cls("exponential", weight)

    def apply(self, losses: ArrayLike) -> NDArray[np.float64]:
        """Return smoothed curves.

        Args:
            losses:
                Curves with one mini-batch loss per step in the last axis.

        Returns:
            Smoothed losses of the same shape.
        """
        values = np.asarray(losses, dtype=np.float64)
        if values.shape[-1] == 0:
            return values
        if self.kind == "exponential":
            from scipy.signal import lfilter

            start = self.width * values[..., :1]
            return np.asarray(
                lfilter([1.0 - self.width], [1.0, -self.width], values, axis=-1, zi=start)[0]
            )
        window = int(self.width)
        head = values[..., :window]
        smoothed = np.cumsum(head, axis=-1) / np.arange(1, head.shape[-1] + 1)
        if values.shape[-1] <= window:
            return np.asarray(smoothed)
        # Not a difference of cumulated sums: one infinite loss would make all later means NaN.
        windows = np.lib.stride_tricks.sliding_window_view(values[..., 1:], window, axis=-1)
        return np.concatenate([smoothed, windows.mean(axis=-1)], axis=-1)
