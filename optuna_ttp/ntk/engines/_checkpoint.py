"""The protocol of an object that stores finished blocks of the kernel."""

from __future__ import annotations

from typing import Any
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


def check_checkpoint(checkpoint: Any) -> None:
    """Raise TypeError unless ``checkpoint`` is :obj:`None` or a :class:`KernelCheckpoint`."""
    methods = [getattr(checkpoint, name, None) for name in ("save_block", "load_block")]
    is_one = all(map(callable, methods)) and not isinstance(checkpoint, type)
    if checkpoint is not None and not is_one:
        raise TypeError(
            "checkpoint must be an object with the methods save_block and load_block, like "
            f"KernelCheckpoint, but got {checkpoint!r}."
        )


def load_arrays(
    checkpoint: KernelCheckpoint, key: tuple[int, int], shapes: list[tuple[int, ...]]
) -> list[NDArray[np.floating[Any]]] | None:
    """Return the arrays of a block that was saved under a key.

    Returns :obj:`None` if there is no block, it has other shapes, or a number is not finite.
    TypeError is raised if the checkpoint returns anything but a list of floating-point arrays.
    """
    arrays: Any = checkpoint.load_block(key)
    if arrays is None:
        return None
    if not isinstance(arrays, list | tuple) or not all(
        isinstance(a, np.ndarray) and np.issubdtype(a.dtype, np.floating) for a in arrays
    ):
        what = [
            str(a.dtype) if isinstance(a, np.ndarray) else type(a).__name__
            for a in (arrays if isinstance(arrays, list | tuple) else [arrays])
        ]
        raise TypeError(
            "checkpoint.load_block must return the list of floating-point arrays that save_block "
            f"was given, or None, but got {', '.join(what) or 'none'} for the block {key}. Delete "
            "what it keeps, or return None to have the block computed again."
        )
    if [a.shape for a in arrays] != shapes or not all(np.isfinite(a).all() for a in arrays):
        return None
    return list(arrays)


class KernelCheckpoint(Protocol):
    """Stores finished blocks of the kernel of one task and one set of settings.

    A block is saved as soon as it is complete, so that an interruption loses at most one block.
    Blocks of other shapes, or with numbers that are not finite, are computed again.
    """

    def save_block(self, key: tuple[int, int], arrays: list[NDArray[np.floating[Any]]]) -> None:
        """Save the arrays of a block under the indices of its first row's and column's samples."""

    def load_block(self, key: tuple[int, int]) -> list[NDArray[np.floating[Any]]] | None:
        """Return the arrays that were saved under a key, or :obj:`None` if there are none."""
