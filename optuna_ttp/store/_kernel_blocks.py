"""Blocks of a kernel as a checkpoint's arrays."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from optuna_ttp.store._checkpoint import Checkpoint


class KernelBlocks:
    """Keeps the blocks of :class:`~optuna_ttp.ntk.KernelCheckpoint` in the database.

    Args:
        checkpoint:
            Of the task and the settings.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def save_block(self, key: tuple[int, int], arrays: list[NDArray[np.floating[Any]]]) -> None:
        """Keep a block.

        Args:
            key:
                The first samples of its rows and of its columns.
            arrays:
                What it consists of.
        """
        for place, array in enumerate(arrays):
            self._checkpoint.save_block(_name(key, place), array)
        # Written last: without it the block is not complete.
        self._checkpoint.save_block(_name(key, "count"), np.array([len(arrays)]))

    def load_block(self, key: tuple[int, int]) -> list[NDArray[np.floating[Any]]] | None:
        """Return what was saved under a key, or :obj:`None`.

        Args:
            key:
                As it was saved.

        Returns:
            The arrays.
        """
        count = self._checkpoint.load_block(_name(key, "count"))
        if count is None:
            return None
        arrays = [self._checkpoint.load_block(_name(key, k)) for k in range(int(count[0]))]
        known = [a for a in arrays if a is not None]
        return known if len(known) == len(arrays) else None


def _name(key: tuple[int, int], part: int | str) -> str:
    return f"kernel {key[0]} {key[1]} {part}"
