"""Where finished blocks of the kernel can be kept."""

from __future__ import annotations

from typing import Any
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class KernelCheckpoint(Protocol):
    """Keeps finished blocks of the kernel of one task and one set of settings.

    A block is only saved when it is complete: interrupting the computation loses at most one.
    Blocks of another size than those that are looked for are computed again.
    """

    def save_block(self, key: tuple[int, int], arrays: list[NDArray[np.floating[Any]]]) -> None:
        """Keep a block.

        Args:
            key:
                The first samples of its rows and of its columns.
            arrays:
                What it consists of.
        """

    def load_block(self, key: tuple[int, int]) -> list[NDArray[np.floating[Any]]] | None:
        """Return what was saved under a key, or :obj:`None`.

        Args:
            key:
                As it was saved.
        """
