"""Which engine computes a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_enough_memory
from optuna_ttp._util.checks import check_memory
from optuna_ttp.task import check_task


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


ENGINES = ("exact", "sketch", "refined_sketch", "matrix_free")
# Share of the memory budget that the kernel may take.
_KERNEL_SHARE = 0.5
# Bytes of an entry: the sum in double precision and the kernel itself.
_ENTRY_BYTES = 12
# Multiplications of the product of all rows, of which the contraction needs a fraction.
_MAX_PRODUCT = 2e14
# Numbers a row of the first sketch, and of the widest.
WIDTH = 4096
_MAX_WIDTH = 32768
# Of a row of the narrowest sketch in single precision, and a copy.
_SKETCH_BYTES = WIDTH * 4 * 2
# A sketch makes a backward pass for each output of each sample, products a few hundred in all.
_MAX_OUTPUTS = 500


def resolve_engine(
    task: FineTuningTask, engine: str = "auto", *, max_memory: int = 4 * 2**30
) -> tuple[str, str]:
    """Name the engine that ``"auto"`` stands for.

    It only depends on N, C, D and the memory budget, not on the machine, so that a spectrum that
    was stored is found again.

    Args:
        task:
            What is fine-tuned.
        engine:
            ``"auto"``, the default, or the name of an engine, which stays.
        max_memory:
            Bytes. 4 GiB by default.

    Returns:
        The engine's name, and why it is the one.

    Raises:
        TypeError:
            If the task is none, or the memory budget no number.
        ValueError:
            If there is no such engine, it does not know the task's learning-rate multipliers, or
            the memory budget is not positive.
    """
    check_task(task)
    check_memory(max_memory)
    if engine in ENGINES:
        if engine != "exact":
            check_multipliers(task, engine)
        return engine, "asked for"
    if engine != "auto":
        known = ", ".join(f'"{name}"' for name in ("auto", *ENGINES))
        raise ValueError(f"engine must be one of {known} but got {engine!r}.")
    n_rows = task.n_samples * task.n_outputs
    if any(factor != 1.0 for factor in task.multipliers.values()):
        return "exact", "the only one that knows learning-rate multipliers"
    if _ENTRY_BYTES * n_rows**2 > _KERNEL_SHARE * max_memory:
        reason = "the kernel would take too much memory"
    elif float(n_rows) ** 2 * task.n_parameters / 2 > _MAX_PRODUCT:
        reason = "the product of all rows would take too long"
    else:
        return "exact", "the kernel fits, and its product is affordable"
    if _SKETCH_BYTES * n_rows > max_memory:
        return "matrix_free", f"{reason}, and so would a sketch"
    if task.n_outputs > _MAX_OUTPUTS:
        return "matrix_free", f"{reason}, and there are too many outputs for a sketch"
    return "sketch", reason


def check_multipliers(task: FineTuningTask, engine: str) -> None:
    """Refuse learning-rate multipliers, which only the exact engine knows.

    Args:
        task:
            What is fine-tuned.
        engine:
            The name of another engine.

    Raises:
        ValueError:
            If one is not one.
    """
    for name, factor in task.multipliers.items():
        if factor != 1.0:
            raise ValueError(
                f'learning_rate_multipliers must all be one for the engine "{engine}" but got '
                f'{factor} for {name!r}. Use engine="exact", the only one that knows them.'
            )


def check_sketch_memory(task: FineTuningTask, itemsize: int, max_memory: float) -> int:
    """Refuse a memory budget that the narrowest sketch does not fit.

    Args:
        task:
            What is fine-tuned.
        itemsize:
            Bytes of a number.
        max_memory:
            Bytes.

    Returns:
        The smallest budget.

    Raises:
        ValueError:
            If it does not fit.
    """
    n_rows = task.n_samples * task.n_outputs
    # And a copy.
    minimum = 2 * n_rows * WIDTH * itemsize
    what = f"a sketch of {n_rows} outputs"
    check_enough_memory(max_memory, minimum, what, "or fewer samples")
    return minimum


def widest_sketch(task: FineTuningTask, dtype: str, *, max_memory: int = 4 * 2**30) -> int:
    """Say how wide a sketch may become.

    Args:
        task:
            What is fine-tuned.
        dtype:
            ``"float32"`` or ``"float64"``.
        max_memory:
            Bytes. 4 GiB by default.

    Returns:
        Numbers a row.
    """
    row_bytes = 2 * (8 if dtype == "float64" else 4) * task.n_samples * task.n_outputs
    width = WIDTH
    while width < _MAX_WIDTH and 2 * width * row_bytes <= max_memory:
        width *= 2
    return width
