"""The fine-tuning task: model, data and loss, which are checked; the model stays unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names


if TYPE_CHECKING:
    from optuna_ttp.task._frozen_model import FrozenModel
    from optuna_ttp.task._functional import functional_call
    from optuna_ttp.task._loss import Loss
    from optuna_ttp.task._loss import output_gradients
    from optuna_ttp.task._task import check_task
    from optuna_ttp.task._task import FineTuningTask
    from optuna_ttp.task._tensors import map_tensors
    from optuna_ttp.task._tensors import tensors_of


__all__ = [
    "FineTuningTask",
    "FrozenModel",
    "Loss",
    "check_task",
    "functional_call",
    "map_tensors",
    "output_gradients",
    "tensors_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_frozen_model": ("FrozenModel",),
        "_functional": ("functional_call",),
        "_loss": (
            "Loss",
            "output_gradients",
        ),
        "_task": (
            "check_task",
            "FineTuningTask",
        ),
        "_tensors": (
            "map_tensors",
            "tensors_of",
        ),
    },
)
