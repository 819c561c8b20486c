"""The device and the precision in which a Jacobian is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.checks import check_device


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A Jacobian is stored, but neither computed nor multiplied, in these precisions.
HELD = {"bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str, engine: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the precision for computing a Jacobian, and the one for holding it, None if equal.

    ValueError is raised if ``dtype`` is unknown, or is ``"bfloat16"`` for an engine but "exact".
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
    """Return ``device`` if it is given, else a GPU if one is available, else the model's device.

    ValueError is raised if ``device`` cannot be used on this machine.
    """
    if device is not None:
        return check_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return next(task.model.parameters()).device
