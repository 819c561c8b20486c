"""Layers under ``torch.utils.checkpoint`` as plain calls, while a model is frozen.

A checkpointed layer is run again in the backward pass. That is too late here: the user's own
weights, of another precision or other values, are back in their places then. The re-entrant
form also loses the gradients of all weights unless an input has one, and refuses
:func:`torch.autograd.grad`. A plain call gives the same outputs and derivatives with more memory.
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
# The threads that are inside of plain_checkpoints(), once for each time they entered it.
_inside: list[int] = []
# Each thread inside has the attribute ``training``, True while a training step is timed.
_local = threading.local()
# ``checkpoint`` is imported by name everywhere, so the functions that it calls are replaced.
_original_generator: Any = checkpointing._checkpoint_without_reentrant_generator
_original_apply: Any = checkpointing.CheckpointFunction.apply
# The number of settings before the function's own arguments; newer releases have more of them.
_n_settings: int = _original_generator.__code__.co_argcount - 1


@contextmanager
def plain_checkpoints(*, training: bool) -> Iterator[None]:
    """Call checkpointed functions plainly in this thread; other threads are not affected.

    While a training step is timed (``training``), each runs once more without a graph, which takes
    as long as the recomputation in the backward pass would.
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
    """Replace the two functions behind ``checkpoint``, unless another thread has done so."""
    owner: Any = checkpointing
    with _lock:
        _inside.append(threading.get_ident())
        if len(_inside) == 1:
            owner._checkpoint_without_reentrant_generator = _generator
            owner.CheckpointFunction.apply = _apply


def _leave() -> None:
    """Put back two functions of PyTorch when the last thread leaves :func:`plain_checkpoints`."""
    owner: Any = checkpointing
    with _lock:
        _inside.pop()
        if not _inside:
            owner._checkpoint_without_reentrant_generator = _original_generator
            # Without the replacement, the inherited method is used again.
            del owner.CheckpointFunction.apply


def _generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stand in for the generator that ``checkpoint`` advances around its call of the function."""
    if not hasattr(_local, "training"):
        return _original_generator(function, *args, **kwargs)  # type: ignore[no-any-return]
    return _around(function, args[_n_settings:], kwargs)


def _around(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Yield once, for ``checkpoint``'s call of the function, after :func:`_run_again`."""
    _run_again(function, args, kwargs)
    yield


def _apply(function: Callable[..., Any], preserve: Any, *args: Any) -> Any:
    """Stand in for ``checkpoint``'s re-entrant form: call the function plainly, if inside."""
    if not hasattr(_local, "training"):
        return _original_apply(function, preserve, *args)
    _run_again(function, args, {})
    return function(*args)


def _run_again(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run the function without a graph, for the time that it takes, if a step is timed."""
    if _local.training:
        with torch.no_grad():
            function(*args, **kwargs)
