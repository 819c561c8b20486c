"""Checks of arguments of general types: numbers, seeds, bytes, devices, choices."""

from __future__ import annotations

import math
import sys
from typing import Any
from typing import SupportsFloat
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch


def check_number(name: str, value: Any) -> None:
    """Raise TypeError if the value of the argument ``name`` is no number; bools are none."""
    if (
        isinstance(value, bool | str)
        or np.ndim(value) != 0
        or not isinstance(value, SupportsFloat)
    ):
        raise TypeError(f"{name} must be a number but got {value!r}.")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must not be too large for a float but got {value!r:.20}...")


def check_range(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, kind: type = object
) -> None:
    """Raise unless ``name`` is a number of a type, at least ``low`` and at most ``high``."""
    check_number(name, value)
    check_kind(name, value, kind)
    if not low <= value <= high:
        limits = "not be negative" if low == 0 else f"be at least {low:g}"
        limits = "be a number" if math.isnan(value) else limits
        limits = limits if high == math.inf else f"be in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must {limits} but got {value}.")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError if ``value`` is not of type ``kind``; a NumPy bool counts as a bool."""
    if not isinstance(value, (bool, np.bool_) if kind is bool else kind):
        raise TypeError(f"{name} must be a {kind.__name__} but got {value!r}.")


def check_seed(seed: Any) -> int:
    """Return a whole number from 0 to ``2**62 - 1`` as an int; raise ValueError for others."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0 but got {seed!r}.")
    # PyTorch's seeds have 64 bits, and others are derived from this one.
    if seed >= 2**62:
        raise ValueError(f"seed must be less than 2**62 but got {seed!r}.")
    return int(seed)


def check_memory(max_memory: Any) -> None:
    """Raise TypeError or ValueError if a memory budget is no positive, finite number of bytes."""
    check_bytes(max_memory)
    if not (math.isfinite(max_memory) and max_memory > 0):
        raise ValueError(
            f"max_memory must be a positive, finite number of bytes but got {max_memory!r}."
        )


def check_bytes(max_memory: Any) -> None:
    """Raise TypeError if a memory budget is not a number."""
    try:
        check_number("max_memory", max_memory)
    except TypeError as error:
        raise TypeError(
            f"max_memory must be a number of bytes but got {max_memory!r}. Give 4 * 2**30 for "
            "4 GiB."
        ) from error


def check_enough_memory(max_memory: float, minimum: int, what: str, advice: str) -> None:
    """Raise ValueError if the budget ``max_memory`` is below ``minimum`` bytes.

    The message names the computation, ``what``, and ends with an alternative to more memory.
    """
    if not max_memory >= minimum:
        raise ValueError(
            f"max_memory must be at least {minimum} bytes ({minimum / 2**30:.3g} GiB) for {what} "
            f"but got {max_memory} ({max_memory / 2**30:.3g} GiB). Give more memory, {advice}."
        )


def check_device(device: Any) -> torch.device:
    """Return a device or its name as a torch device; raise ValueError if it is unusable here."""
    import torch

    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).cpu()
    # They come from unknown names, builds without CUDA, the meta device and other types.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device must be one that torch can use here but got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return usable


def check_count(name: str, value: int) -> int:
    """Return the argument ``name`` as an int; raise an error unless it is from 1 to ``2**53``."""
    if not isinstance(value, bool):
        check_number(name, value)
    if isinstance(value, bool) or not 1 <= value <= 2**53 or value != int(value):
        raise ValueError(f"{name} must be a positive integer but got {value!r}.")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Return the argument ``name``; raise ValueError unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} but got {value!r}.")
    return value
