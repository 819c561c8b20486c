"""Locks of models: one thread at a time uses a model, or one that shares modules with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary


if TYPE_CHECKING:
    import torch


_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_NEW = threading.Lock()


@contextmanager
def locked(model: torch.nn.Module) -> Iterator[None]:
    """Hold the locks of all modules of a model, waiting for threads that hold any of them.

    Inside, only this thread changes the modules, and it may enter again without waiting.
    """
    with _NEW:
        locks = {id(m): _LOCKS.setdefault(m, threading.RLock()) for m in model.modules()}
    with ExitStack() as stack:
        # All threads lock in the same order, so that two threads never wait for each other.
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock)
        yield
