"""The choice of the engine that computes a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_enough_memory
from optuna_ttp._util.checks import check_memory
from optuna_ttp.ntk.engines._rules import CHOICE
from optuna_ttp.task import check_task


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


ENGINES = ("exact", "columns", "sketch", "refined_sketch", "matrix_free")


def resolve_engine(
    task: FineTuningTask, engine: str = "auto", *, max_memory: int = 4 * 2**30
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
    n_rows = task.n_samples * task.n_outputs
    if any(factor != 1.0 for factor in task.multipliers.values()):
        return "exact", "the only engine that supports learning-rate multipliers"
    # An entry takes twelve bytes: its sum in double precision and the entry itself.
    if 12 * n_rows**2 > CHOICE.kernel_share * max_memory:
        reason = "the kernel would take too much memory"
    elif float(n_rows) ** 2 * task.n_parameters / 2 > CHOICE.max_product:
        reason = "the product of all rows would take too long"
    else:
        return "exact", "the kernel fits, and its product is affordable"
    # The narrowest sketch is held in single precision, together with a copy.
    if 2 * 4 * CHOICE.sketch_width * n_rows > max_memory:
        return "matrix_free", f"{reason}, and so would a sketch"
    if task.n_outputs > CHOICE.max_outputs:
        return "matrix_free", f"{reason}, and there are too many outputs for a sketch"
    return "sketch", reason


def check_multipliers(task: FineTuningTask, engine: str) -> None:
    """Raise ValueError, with the name ``engine``, if a learning-rate multiplier is not one."""
    for name, factor in task.multipliers.items():
        if factor != 1.0:
            raise ValueError(
                f'learning_rate_multipliers must all be one for the engine "{engine}" but got '
                f'{factor} for {name!r}. Use engine="exact", the only one that supports them.'
            )


def check_sketch_memory(task: FineTuningTask, itemsize: int, max_memory: float) -> int:
    """Return the bytes of the narrowest sketch; raise ValueError if they exceed ``max_memory``.

    ``itemsize`` is the number of bytes per number.
    """
    n_rows = task.n_samples * task.n_outputs
    # The sketch is held together with a copy.
    minimum = 2 * n_rows * CHOICE.sketch_width * itemsize
    what = f"a sketch of {n_rows} outputs"
    check_enough_memory(max_memory, minimum, what, "or fewer samples")
    return minimum


def widest_sketch(task: FineTuningTask, dtype: str, *, max_memory: int = 4 * 2**30) -> int:
    """Return the largest width of a sketch, from 4096 to 32768, for a memory budget in bytes."""
    row_bytes = 2 * (8 if dtype == "float64" else 4) * task.n_samples * task.n_outputs
    width = CHOICE.sketch_width
    while width < CHOICE.max_sketch_width and 2 * width * row_bytes <= max_memory:
        width *= 2
    return width


def most_columns(task: FineTuningTask, itemsize: int, max_memory: float) -> int:
    """Return the most columns that a sample may have, of all weights, for a memory in bytes.

    Columns of ``itemsize`` bytes a number are held about three times.
    """
    n_rows = task.n_samples * task.n_outputs
    minimum = 3 * itemsize * n_rows * min(task.n_parameters, CHOICE.least_columns_a_row * n_rows)
    check_enough_memory(max_memory, minimum, f"columns of {n_rows} outputs", "or fewer samples")
    return int(min(task.n_parameters, max_memory // (3 * itemsize * n_rows)))
