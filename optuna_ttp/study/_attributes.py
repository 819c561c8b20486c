"""The attributes of trials, and reading of values that another program may have stored there."""

from __future__ import annotations

from enum import Enum
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from optuna.trial import BaseTrial


# All that is known of a trial before it runs is one attribute: every write is a journey to the
# database.
RECORD = "ttp:record"
# An objective with a clock of its own may write what a trial took, {"trial": number, "seconds":
# ...}; otherwise it is the time from the trial's start to its end.
PAID = "ttp:paid"
# The curve of its training loss is another attribute, which grows while the trial runs.
CURVE = "ttp:curve"
_TYPES_IN_LISTS = frozenset({int, float, type(None)})
# What reading a value that does not fit raises.
MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


class Word(str, Enum):
    """A word that is stored as it is, and printed as it is."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, form: str) -> str:
        return format(str(self.value), form)


def mapping(value: Any) -> dict[str, Any]:
    """Return a dictionary as it is; raise TypeError if the value is none."""
    if not isinstance(value, dict):
        raise TypeError(f"A dictionary was expected but got {value!r}.")
    return value


def number(value: Any) -> float:
    """Return a number, NaN for :obj:`None` and infinity; raise TypeError for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"A number was expected but got {value!r}.")
    return float(value) if math.isfinite(value) else math.nan


def positive(value: Any) -> float:
    """Return a number above zero; raise ValueError if the value is not one."""
    result = number(value)
    if not result > 0.0:
        raise ValueError(f"A positive number was expected but got {value!r}.")
    return result


def count(value: Any) -> int:
    """Return a whole number that is not negative; raise ValueError if the value is not one."""
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
    """Return a text as it is; raise TypeError if the value is none."""
    if not isinstance(value, str):
        raise TypeError(f"A text was expected but got {value!r}.")
    return value


def or_none(value: float) -> float | None:
    """Return a number as JSON takes it, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def attribute_of(trial: BaseTrial, key: str) -> dict[str, Any] | None:
    """Return the attribute that was written on this very trial under a key, or :obj:`None`.

    A retried trial carries the attributes of the trial that it repeats; those do not count.
    """
    value = trial.user_attrs.get(key)
    if not isinstance(value, dict) or value.get("trial") != trial.number:
        return None
    return value
