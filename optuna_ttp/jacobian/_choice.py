"""Which engine computes a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


ENGINES = ("exact", "sketch", "refined_sketch")
# Share of the memory budget that the kernel may take.
_KERNEL_SHARE = 0.5
# Bytes of an entry: the sum in double precision and the kernel itself.
_ENTRY_BYTES = 12
# Multiplications of the product of all rows, of which the contraction needs a fraction.
_MAX_PRODUCT = 2e14


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
        ValueError:
            If there is no such engine.
    """
    if engine in ENGINES:
        return engine, "asked for"
    if engine != "auto":
        known = ", ".join(f'"{name}"' for name in ("auto", *ENGINES))
        raise ValueError(f"engine must be one of {known} but got {engine!r}.")
    n_rows = task.n_samples * task.n_outputs
    if any(factor != 1.0 for factor in task.multipliers.values()):
        return "exact", "the only one that knows learning-rate multipliers"
    if _ENTRY_BYTES * n_rows**2 > _KERNEL_SHARE * max_memory:
        return "sketch", "the kernel would take too much memory"
    if float(n_rows) ** 2 * task.n_parameters / 2 > _MAX_PRODUCT:
        return "sketch", "the product of all rows would take too long"
    return "exact", "the kernel fits, and its product is affordable"
