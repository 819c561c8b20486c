"""One thread at a time borrows a model, or one that shares modules with it."""

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
    """Wait until no other thread has any module of a model, and keep them meanwhile.

    Their hooks, modes and parameters are ours then. A thread that has them may take them again.

    Args:
        model:
            Any.

    Yields:
        Nothing.
    """
    with _NEW:
        locks = {id(m): _LOCKS.setdefault(m, threading.RLock()) for m in model.modules()}
    with ExitStack() as stack:
        # In the same order everywhere, so that threads never wait for one another.
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock)
        yield
