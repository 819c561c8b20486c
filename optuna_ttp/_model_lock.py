"""One thread at a time borrows a model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary


if TYPE_CHECKING:
    import torch


_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_NEW = threading.Lock()


def lock_of(model: torch.nn.Module) -> threading.RLock:
    """Return the lock of a model, whose hooks, mode and parameters are ours while it is held.

    Args:
        model:
            Any.

    Returns:
        The same for the same model; a thread that has it may take it again.
    """
    with _NEW:
        return _LOCKS.setdefault(model, threading.RLock())
