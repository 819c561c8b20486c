"""Layers under ``torch.utils.checkpoint`` as plain calls, while a model is frozen.

A checkpointed layer is run again in the backward pass. That is too late here: the user's own
weights are back in their places then, in another precision or at another point. The re-entrant
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
# One entry for each thread that is inside.
_inside: list[int] = []
# Whether a training step is timed, of each thread that is inside.
_local = threading.local()
# What ``checkpoint`` calls: it is imported by name everywhere, so that replacing it is no use.
_original_generator: Any = checkpointing._checkpoint_without_reentrant_generator
_original_apply: Any = checkpointing.CheckpointFunction.apply
# Arguments between the checkpointed function and its own, of which newer releases have more.
_n_settings: int = _original_generator.__code__.co_argcount - 1


@contextmanager
def plain_checkpoints(*, training: bool) -> Iterator[None]:
    """Call checkpointed functions plainly in this thread; other threads are not affected.

    While a training step is timed (``training``), each runs once more without a graph, which takes
    the time of the recomputation in the backward pass.
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
    """Restore the two functions, unless another thread still needs the replacements."""
    owner: Any = checkpointing
    with _lock:
        _inside.pop()
        if not _inside:
            owner._checkpoint_without_reentrant_generator = _original_generator
            # The inherited one is in its place again.
            del owner.CheckpointFunction.apply


def _generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Replace the generator that ``checkpoint`` advances before and after the function."""
    if not hasattr(_local, "training"):
        return _original_generator(function, *args, **kwargs)  # type: ignore[no-any-return]
    return _around(function, args[_n_settings:], kwargs)


def _around(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Run the function again before ``checkpoint`` calls it, while a step is timed."""
    _run_again(function, args, kwargs)
    yield


def _apply(function: Callable[..., Any], preserve: Any, *args: Any) -> Any:
    """Replace the re-entrant form by a plain call of the function."""
    if not hasattr(_local, "training"):
        return _original_apply(function, preserve, *args)
    _run_again(function, args, {})
    return function(*args)


def _run_again(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run the function without a graph where a training step is timed."""
    if _local.training:
        with torch.no_grad():
            function(*args, **kwargs)
