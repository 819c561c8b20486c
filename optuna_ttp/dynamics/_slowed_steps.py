"""Steps of SGD that move the outputs less far because they are large."""

from __future__ import annotations

import numpy as np
import torch

from optuna_ttp._util.arrays import Floats


class SlowedSteps:
    """The ratio by which saturation shortens each step of SGD, for one batch size.

    Saturation is measured along first steps, whose length is the learning rate times the norm of
    the gradient. Later gradients are shorter, and momentum adds them up. So the ratio of a step is
    that of a first step that moves the weights as far.

    ``lengths``, ascending, and ``ratios`` at these are ``(R,)`` with R at least 2; in between the
    logarithm of the ratio is linear in that of the length. States are like the tensor ``like``;
    ``inflation`` is that of single weights, None on eigen-directions.
    """

    def __init__(
        self,
        lengths: Floats,
        ratios: Floats,
        like: torch.Tensor,
        inflation: torch.Tensor | None,
    ) -> None:
        self._lengths = torch.as_tensor(np.log(np.maximum(lengths, 1e-30))).to(like)
        self._log_ratios = torch.as_tensor(np.log(ratios)).to(like)
        self._inflation = inflation

    def ratios(self, rate: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Return the ratios ``(K, 1)`` at steps of ``rate`` ``(K, 1)`` times ``(K, r)``."""
        squares = direction.square()
        if self._inflation is not None:
            squares = squares * self._inflation
        length = (rate * squares.sum(dim=1, keepdim=True).sqrt()).abs().log()
        after = torch.searchsorted(self._lengths, length).clamp(1, len(self._lengths) - 1)
        low, high = self._lengths[after - 1], self._lengths[after]
        share = ((length - low) / (high - low)).clamp(0.0, 1.0)
        return torch.lerp(self._log_ratios[after - 1], self._log_ratios[after], share).exp()
