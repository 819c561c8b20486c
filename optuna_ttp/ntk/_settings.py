"""The settings of an engine, which are the same for all engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class EngineSettings:
    """Device, precision, memory budget and seed of an engine.

    ``dtype`` is the precision for computing the Jacobian, ``held`` the precision for storing it
    (None for ``dtype``). ``max_memory`` is the budget in bytes for the stored part of the Jacobian
    and for the result. ``seed`` is for projections, start vectors and the checks of gradients.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    held: torch.dtype | None = None
    max_memory: int = 4 * 2**30
    seed: int = 0
    show_progress_bar: bool = True

    @property
    def place(self) -> dict[str, Any]:
        """Return device and ``dtype`` as keyword arguments of functions that make a tensor."""
        return {"device": self.device, "dtype": self.dtype}
