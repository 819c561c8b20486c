"""What every engine is told beside the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class EngineSettings:
    """Where and how precisely an engine computes, and in how much memory.

    ``dtype`` is the precision of the Jacobian, and ``held`` that which it is held in, if another.
    ``max_memory`` are bytes for what is held of the Jacobian and for the result. ``seed`` is that
    of what is random: projections, where products start, and what gradients are checked on.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    held: torch.dtype | None = None
    max_memory: int = 4 * 2**30
    seed: int = 0
    show_progress_bar: bool = True

    @property
    def place(self) -> dict[str, Any]:
        """Return device and precision as arguments of a tensor."""
        return {"device": self.device, "dtype": self.dtype}
