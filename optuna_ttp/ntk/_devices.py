"""Where, and in which precision, a Jacobian is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.checks import check_device


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Precisions that a Jacobian is held in, but neither computed nor multiplied.
HELD = {"bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str, engine: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the precision that a Jacobian is computed in, and that it is held in if that differs.

    ValueError is raised if there is no such precision, or the engine holds no Jacobian.
    """
    if dtype in HELD:
        if engine != "exact":
            raise ValueError(
                f'dtype={dtype!r} needs the engine "exact" but got {engine!r}: the others do not '
                'hold the Jacobian. Give dtype="float32".'
            )
        return torch.float32, HELD[dtype]
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted({**DTYPES, **HELD})} but got {dtype!r}.")
    return DTYPES[dtype], None


def resolve_device(task: FineTuningTask, device: str | torch.device | None) -> torch.device:
    """Return where to compute: as asked, else on a GPU where there is one, else with the model.

    ValueError is raised if the device that was asked for cannot be used here.
    """
    if device is not None:
        return check_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return next(task.model.parameters()).device
