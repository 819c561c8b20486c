"""Layers under ``torch.utils.checkpoint`` as plain calls, while the model is borrowed.

A checkpointed layer is run again in the backward pass. That comes too late for us: the user's own
weights are back in their places then, in another precision or at another point. The re-entrant
form also loses the gradients of all weights unless it is given an input that has one, and refuses
:func:`torch.autograd.grad`. What a checkpoint returns, and its derivative, are those of a plain
call, which only takes more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import threading
from typing import Any

import torch
from torch.utils import checkpoint as checkpointing


_lock = threading.Lock()
_n_inside = 0
# Of a thread that is inside: whether a training step is timed.
_local = threading.local()
# What ``checkpoint`` calls: it is imported by name everywhere, so that replacing it is no use.
_original_generator: Any = checkpointing._checkpoint_without_reentrant_generator
_original_apply: Any = checkpointing.CheckpointFunction.apply
# Arguments between the checkpointed function and its own, of which newer releases have more.
_n_settings: int = _original_generator.__code__.co_argcount - 1


@contextmanager
def plain_checkpoints(*, training: bool) -> Iterator[None]:
    """Call checkpointed functions plainly in this thread; other threads are not affected.

    Args:
        training:
            A training step is to be timed: they are run once more, without a graph, which takes
            the time of what the backward pass would compute again.
    """
    before = dict(vars(_local))
    _enter()
    _local.training = training
    try:
        yield
    finally:
        vars(_local).clear()
        vars(_local).update(before)
        _leave()


def _enter() -> None:
    global _n_inside
    owner: Any = checkpointing
    with _lock:
        _n_inside += 1
        if _n_inside == 1:
            owner._checkpoint_without_reentrant_generator = _generator
            owner.CheckpointFunction.apply = _apply


def _leave() -> None:
    global _n_inside
    owner: Any = checkpointing
    with _lock:
        _n_inside -= 1
        if _n_inside == 0:
            owner._checkpoint_without_reentrant_generator = _original_generator
            # What it inherits is found again.
            del owner.CheckpointFunction.apply


def _generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what ``checkpoint`` advances before and after it calls the function."""
    if not hasattr(_local, "training"):
        return _original_generator(function, *args, **kwargs)  # type: ignore[no-any-return]
    return _around(function, args[_n_settings:], kwargs)


def _around(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    _run_again(function, args, kwargs)
    yield


def _apply(function: Callable[..., Any], preserve: Any, *args: Any) -> Any:
    """In the place of the re-entrant form."""
    if not hasattr(_local, "training"):
        return _original_apply(function, preserve, *args)
    _run_again(function, args, {})
    return function(*args)


def _run_again(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if _local.training:
        with torch.no_grad():
            function(*args, **kwargs)
