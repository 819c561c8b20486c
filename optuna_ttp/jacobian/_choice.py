"""Which engine computes a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


ENGINES = ("exact",)
# Share of the memory budget that the kernel and its eigenvectors may take.
_KERNEL_SHARE = 0.5
# Bytes of an entry: the sum in double precision and the kernel itself.
_ENTRY_BYTES = 12


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
    return "exact", "the only engine"
