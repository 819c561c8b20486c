"""Hashing of weights, data and code so that every process gets the same digest."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import functools
import hashlib
import re
from types import CodeType
from types import FunctionType
from types import MethodType
from typing import Any

import numpy as np
import torch


_PLAIN = (bool, int, float, str, type(None))


def hash_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    """Add ``name`` and a tensor's type, shape and bytes to a digest."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    contiguous = tensor.detach().cpu().contiguous()
    # Byte view, because numpy has no bfloat16.
    digest.update(contiguous.reshape(-1).view(torch.uint8).numpy().data)


def hash_value(digest: hashlib._Hash, value: Any) -> None:
    """Add a value to a digest: tensors, containers, code and modules by content, else its repr."""
    if isinstance(value, torch.Tensor):
        hash_tensor(digest, "tensor", value)
    elif isinstance(value, np.ndarray):
        hash_tensor(digest, "array", torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"key {key}".encode())
            hash_value(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)}".encode())
        for element in value:
            hash_value(digest, element)
    elif isinstance(value, set | frozenset):
        # The order of a set differs between processes.
        digest.update(f"set {sorted(map(plain_repr, value))}".encode())
    elif isinstance(value, CodeType):
        digest.update(value.co_code)
        hash_value(digest, (value.co_names, value.co_consts))
    elif isinstance(value, FunctionType):
        hash_value(digest, value.__code__)
    elif isinstance(value, torch.nn.Module):
        hash_value(digest, (plain_repr(value), value.state_dict()))
    else:
        digest.update(plain_repr(value).encode())


def plain_repr(value: Any) -> str:
    """Return a value's repr without memory addresses, which differ between processes."""
    return re.sub(r"0x[0-9a-fA-F]+", "", repr(value))


def hash_function(digest: hashlib._Hash, function: Callable[..., Any] | None) -> None:
    """Add a function's name, code, defaults and constant closure values to a digest.

    Arguments of a partial and plain attributes of a method's or callable's object are added, too.
    """
    if isinstance(function, functools.partial):
        hash_value(digest, ("partial", function.args, function.keywords))
        function = function.func
    if isinstance(function, MethodType):
        hash_value(digest, _plain_attributes(function.__self__))
        function = function.__func__
    if callable(function) and not hasattr(function, "__qualname__"):
        hash_value(digest, _plain_attributes(function))
        function = type(function).__call__
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    digest.update(f"function {name}".encode())
    if isinstance(function, FunctionType):
        hash_value(digest, (function, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                # The variable is not assigned yet.
                continue
            # Mutable values, such as a list that counts calls, are no settings.
            if isinstance(value, (*_PLAIN, tuple, torch.Tensor, torch.nn.Module, FunctionType)):
                hash_value(digest, value)


def hash_module_settings(digest: hashlib._Hash, name: str, module: torch.nn.Module) -> None:
    """Add a module's plain attributes, and its code if it is not PyTorch's own, to a digest."""
    hash_value(digest, (name, _plain_attributes(module)))
    if not type(module).__module__.startswith("torch."):
        hash_function(digest, type(module).forward)


def _plain_attributes(value: Any) -> dict[str, Any]:
    """Return an object's public attributes, but ``training``, that are numbers, texts or None."""
    return {
        k: v
        for k, v in getattr(value, "__dict__", {}).items()
        if isinstance(v, _PLAIN) and k != "training" and not k.startswith("_")
    }
