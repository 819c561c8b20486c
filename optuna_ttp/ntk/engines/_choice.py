"""The choice of the engine that computes a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_enough_memory
from optuna_ttp._util.checks import check_memory
from optuna_ttp.ntk.engines._rules import CHOICE
from optuna_ttp.ntk.engines._rules import COLUMNS
from optuna_ttp.task import check_task


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# The memory budget by default.
MAX_MEMORY = 4 * 2**30
ENGINES = ("exact", "columns", "matrix_free")


def resolve_engine(
    task: FineTuningTask, engine: str = "auto", *, max_memory: int = MAX_MEMORY
) -> tuple[str, str]:
    """Return the name of the engine, chosen if ``engine`` is ``"auto"``, and the reason in words.

    The choice depends on N, C, D, multipliers and the memory budget in bytes, not on the machine,
    so that a stored spectrum is found again. TypeError or ValueError is raised if an argument is
    invalid, or the engine does not support the task's learning-rate multipliers.
    """
    check_task(task)
    check_memory(max_memory)
    if engine in ENGINES:
        if engine not in ("exact", "columns"):
            check_multipliers(task, engine)
        return engine, "asked for"
    if engine != "auto":
        known = ", ".join(f'"{name}"' for name in ("auto", *ENGINES))
        raise ValueError(f"engine must be one of {known} but got {engine!r}.")
    if any(factor != 1.0 for factor in task.multipliers.values()):
        return "columns", "it supports learning-rate multipliers"
    if least_bytes(task, 4) > max_memory:
        return "matrix_free", "a sample of the Jacobian's columns would take too much memory"
    if task.n_outputs > CHOICE.max_outputs:
        return "matrix_free", "there are too many outputs for a sample of the Jacobian's columns"
    if first_columns(task) == task.n_parameters:
        return "columns", "there are so few weights that all columns of the Jacobian are taken"
    return "columns", "a sample of the Jacobian's columns costs the least"


def check_multipliers(task: FineTuningTask, engine: str) -> None:
    """Raise ValueError, with the name ``engine``, if a learning-rate multiplier is not one."""
    for name, factor in task.multipliers.items():
        if factor != 1.0:
            raise ValueError(
                f'learning_rate_multipliers must all be one for the engine "{engine}" but got '
                f'{factor} for {name!r}. Use engine="columns" or engine="exact".'
            )


def first_columns(task: FineTuningTask) -> int:
    """Return the number of columns of the first sample, if the memory allows it."""
    n_rows = task.n_samples * task.n_outputs
    return min(task.n_parameters, max(COLUMNS.min_columns, COLUMNS.columns_a_row * n_rows))


def most_columns(task: FineTuningTask, itemsize: int, max_memory: float) -> int:
    """Return the most columns that a sample may have, for a memory in bytes.

    Columns of ``itemsize`` bytes a number are held about three times. ValueError is raised if the
    memory does not suffice for the smallest sample.
    """
    n_rows = task.n_samples * task.n_outputs
    minimum = least_bytes(task, itemsize)
    check_enough_memory(max_memory, minimum, f"columns of {n_rows} outputs", "or fewer samples")
    allowed = int(max_memory // (3 * itemsize * n_rows))
    return min(task.n_parameters, allowed, COLUMNS.most_growth * first_columns(task))


def column_limit(
    task: FineTuningTask, dtype: str = "float32", *, max_memory: int = MAX_MEMORY
) -> int | None:
    """Return the most columns of a sample, or None if it is what the default memory allows.

    It is part of the identity of a stored spectrum.
    """
    itemsize = 8 if dtype == "float64" else 4
    limit = most_columns(task, itemsize, max_memory)
    if least_bytes(task, itemsize) > MAX_MEMORY:
        return limit
    return None if limit == most_columns(task, itemsize, MAX_MEMORY) else limit


def least_bytes(task: FineTuningTask, itemsize: int) -> int:
    """Return the bytes of the smallest sample of columns, with ``itemsize`` bytes a number."""
    n_rows = task.n_samples * task.n_outputs
    n_columns = min(task.n_parameters, CHOICE.least_columns_a_row * n_rows)
    return 3 * itemsize * n_rows * n_columns
