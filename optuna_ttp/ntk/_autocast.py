"""Computing in the requested precision, also inside :class:`torch.autocast`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec
from typing import TypeVar

import torch


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_KINDS = ("cpu", "cuda", "mps", "xpu")


def without_autocast(
    function: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """Turn an enclosing :class:`torch.autocast` off while a function runs.

    Autocast would round products of rows to half precision, and would change the function that
    the model computes.
    """

    @wraps(function)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with ExitStack() as stack:
            for kind in _KINDS:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run
