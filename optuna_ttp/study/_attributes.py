"""The attributes of trials, and checks of values that another program may have stored there."""

from __future__ import annotations

from enum import Enum
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from optuna.trial import BaseTrial


# Prediction and decision share one attribute, because every write is a request to the database.
RECORD = "ttp:record"
# An objective with its own clock may write {"trial": number, "seconds": ...}; otherwise a trial's
# seconds are the time from its start to its end.
PAID = "ttp:paid"
# The curve of the training loss is another attribute, which grows while the trial runs.
CURVE = "ttp:curve"
_TYPES_IN_LISTS = frozenset({int, float, type(None)})
# The exceptions that reading a value of the wrong kind may raise.
MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


class Word(str, Enum):
    """An enumeration member that is stored and printed as its value."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, form: str) -> str:
        return format(str(self.value), form)


def mapping(value: Any) -> dict[str, Any]:
    """Return a value that is a dictionary unchanged; raise TypeError for any other value."""
    if not isinstance(value, dict):
        raise TypeError(f"A dictionary was expected but got {value!r}.")
    return value


def number(value: Any) -> float:
    """Return a number as a float, NaN for None or infinity; raise TypeError for other values."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"A number was expected but got {value!r}.")
    return float(value) if math.isfinite(value) else math.nan


def positive(value: Any) -> float:
    """Return a number above zero as a float; raise ValueError if it is not, TypeError if none."""
    result = number(value)
    if not result > 0.0:
        raise ValueError(f"A positive number was expected but got {value!r}.")
    return result


def count(value: Any) -> int:
    """Return a number as an int; raise ValueError if it is negative or not a whole number."""
    result = number(value)
    if not (result >= 0.0 and result.is_integer()):
        raise ValueError(f"A count was expected but got {value!r}.")
    return int(result)


def numbers(values: Any) -> NDArray[np.float64]:
    """Return a list of numbers as an array, NaN for each :obj:`None`; it may hold infinity."""
    # The types are looked at together, because long lists are read at every decision.
    if not isinstance(values, list | tuple) or not set(map(type, values)) <= _TYPES_IN_LISTS:
        raise TypeError(f"A list of numbers was expected but got {values!r}.")
    return np.array(values, dtype=np.float64)


def text(value: Any) -> str:
    """Return a value that is a string unchanged; raise TypeError for any other value."""
    if not isinstance(value, str):
        raise TypeError(f"A text was expected but got {value!r}.")
    return value


def or_none(value: float) -> float | None:
    """Return a finite number unchanged, and None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def attribute_of(trial: BaseTrial, key: str) -> dict[str, Any] | None:
    """Return the dictionary that was stored with a trial under a key, or None.

    A retried trial has copies of the attributes of the trial that it repeats; the number in the
    attribute ``"trial"`` tells them apart, and copies are ignored.
    """
    value = trial.user_attrs.get(key)
    if not isinstance(value, dict) or value.get("trial") != trial.number:
        return None
    return value
