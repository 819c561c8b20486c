"""Checks of arguments that know no type of this package."""

from __future__ import annotations

import math
from typing import Any
from typing import SupportsFloat
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import torch


# A sketch makes four seeds of each; those of PyTorch have 64 bits.
_SEEDS = 2**62


def check_number(name: str, value: Any) -> None:
    """Refuse what is no number.

    Args:
        name:
            Of the argument.
        value:
            What was given.

    Raises:
        TypeError:
            If it is none.
    """
    if (
        isinstance(value, bool | str)
        or np.ndim(value) != 0
        or not isinstance(value, SupportsFloat)
    ):
        raise TypeError(f"{name} must be a number but got {value!r}.")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Refuse what is not of a type.

    Args:
        name:
            Of the argument.
        value:
            What was given.
        kind:
            The type.

    Raises:
        TypeError:
            If it is none.
    """
    if not isinstance(value, (bool, np.bool_) if kind is bool else kind):
        raise TypeError(f"{name} must be a {kind.__name__} but got {value!r}.")


def check_seed(seed: Any) -> int:
    """Refuse what is no seed.

    Args:
        seed:
            What was given.

    Returns:
        The seed; PyTorch takes no integers of NumPy.

    Raises:
        ValueError:
            If it is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0 but got {seed!r}.")
    if seed >= _SEEDS:
        raise ValueError(f"seed must be less than 2**62 but got {seed!r}.")
    return int(seed)


def check_memory(max_memory: Any) -> None:
    """Refuse what is no memory budget.

    Args:
        max_memory:
            What was given.

    Raises:
        TypeError:
            If it is no number.
        ValueError:
            If it is not positive and finite.
    """
    check_bytes(max_memory)
    if not (math.isfinite(max_memory) and max_memory > 0):
        raise ValueError(
            f"max_memory must be a positive, finite number of bytes but got {max_memory!r}."
        )


def check_bytes(max_memory: Any) -> None:
    """Refuse a memory budget that is no number.

    Args:
        max_memory:
            What was given.

    Raises:
        TypeError:
            If it is none.
    """
    try:
        check_number("max_memory", max_memory)
    except TypeError as error:
        raise TypeError(
            f"max_memory must be a number of bytes but got {max_memory!r}. Give 4 * 2**30 for "
            "4 GiB."
        ) from error


def check_enough_memory(max_memory: float, minimum: int, what: str, advice: str) -> None:
    """Refuse a memory budget that something does not fit.

    Args:
        max_memory:
            What was given, in bytes.
        minimum:
            What it takes, in bytes.
        what:
            What takes it.
        advice:
            What to do but giving more.

    Raises:
        ValueError:
            If it does not fit.
    """
    if not max_memory >= minimum:
        raise ValueError(
            f"max_memory must be at least {minimum} bytes ({minimum / 2**30:.3g} GiB) for {what} "
            f"but got {max_memory} ({max_memory / 2**30:.3g} GiB). Give more memory, {advice}."
        )


def check_device(device: Any) -> torch.device:
    """Refuse what torch cannot use here.

    Args:
        device:
            Its name.

    Returns:
        The device.

    Raises:
        ValueError:
            If it is none, or none that holds numbers.
    """
    import torch

    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    # An unknown name, a build without CUDA, a device without numbers, no name at all.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device must be one that torch can use here but got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return found


def check_count(name: str, value: int) -> int:
    """Refuse what is no positive integer.

    Args:
        name:
            Of the argument.
        value:
            What was given.

    Returns:
        The integer.

    Raises:
        ValueError:
            If it is none.
    """
    if not isinstance(value, bool):
        check_number(name, value)
    if isinstance(value, bool) or not 1 <= value <= 2**53 or value != int(value):
        raise ValueError(f"{name} must be a positive integer but got {value!r}.")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Refuse what is not one of a few.

    Args:
        name:
            Of the argument.
        value:
            What was given.
        choices:
            The few.

    Returns:
        The value.

    Raises:
        ValueError:
            If it is none.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} but got {value!r}.")
    return value
