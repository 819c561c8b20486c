"""Where, and in which precision, a Jacobian is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optuna_ttp._checks import check_device


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_device(task: FineTuningTask, device: str | torch.device | None) -> torch.device:
    """Return where to compute: as asked, else on a GPU where there is one, else with the model.

    Args:
        task:
            Knows where the model is.
        device:
            What was asked for, or :obj:`None`.

    Returns:
        A device that works.

    Raises:
        ValueError:
            If the device asked for cannot be used here.
    """
    if device is not None:
        return check_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return next(task.model.parameters()).device
