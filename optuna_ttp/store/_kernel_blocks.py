"""Blocks of a kernel, stored as a checkpoint's arrays."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from optuna_ttp.store._checkpoint import Checkpoint


class KernelBlocks:
    """Stores the blocks of :class:`~optuna_ttp.ntk.KernelCheckpoint` in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def save_block(self, key: tuple[int, int], arrays: list[NDArray[np.floating[Any]]]) -> None:
        """Store the arrays of the block whose rows and columns begin at the samples ``key``."""
        blocks = {_name(key, place): array for place, array in enumerate(arrays)}
        self._checkpoint.save_blocks({**blocks, _name(key, "count"): np.array([len(arrays)])})

    def load_block(self, key: tuple[int, int]) -> list[NDArray[np.floating[Any]]] | None:
        """Return the arrays of a block, or None if it or one of its arrays is missing."""
        count = self._checkpoint.load_block(_name(key, "count"))
        if count is None:
            return None
        arrays = [self._checkpoint.load_block(_name(key, k)) for k in range(int(count[0]))]
        present = [a for a in arrays if a is not None]
        return present if len(present) == len(arrays) else None


def _name(key: tuple[int, int], part: int | str) -> str:
    return f"kernel {key[0]} {key[1]} {part}"
