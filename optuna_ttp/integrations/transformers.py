"""Record the training loss of Hugging Face's ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from optuna_ttp.study import TrainingLog


try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "optuna_ttp.integrations.transformers needs the packages transformers and accelerate: "
        "pip install transformers accelerate"
    ) from error


if TYPE_CHECKING:
    import optuna


class TrainingLogCallback(TrainerCallback):  # type: ignore[misc]
    """Records the loss that the trainer logs, with a :class:`~optuna_ttp.TrainingLog`.

    The trainer logs the mean over the optimiser steps since its last log under ``"loss"``, which
    is recorded for the step in their middle. Choose a small ``logging_steps``: the curve has one
    point per log, and its first part corrects predictions most. The trainer hides losses that are
    NaN or infinite unless ``logging_nan_inf_filter=False``.

    The curve is written to the trial when training ends, at the end of each epoch, after each
    evaluation, and each time the number of recorded losses has doubled, so that a trial that is
    pruned after an evaluation has its curve. Call :meth:`close` if another exception may end it.

    Example:
        >>> def objective(trial):
        ...     arguments = TrainingArguments(
        ...         "out",
        ...         learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        ...         optim="sgd",
        ...         lr_scheduler_type="constant",
        ...         logging_steps=5,
        ...         logging_nan_inf_filter=False,
        ...     )
        ...     trainer = Trainer(
        ...         make_model(),
        ...         arguments,
        ...         train_dataset=data,
        ...         callbacks=[TrainingLogCallback(trial)],
        ...     )
        ...     return trainer.train().training_loss

    Args:
        trial:
            The trial of the objective.
    """

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._log = TrainingLog(trial)
        self._n_logged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the first step to the trainer's, which is not zero if training is resumed."""
        self._n_logged = int(state.global_step)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the mean loss since the trainer's last log, on the main process."""
        n_steps = int(state.global_step)
        # Validation losses and the summary at the end have other names.
        if logs is None or "loss" not in logs or n_steps <= self._n_logged:
            return
        if state.is_world_process_zero:
            self._log.step(float(logs["loss"]), step=(self._n_logged + n_steps - 1) // 2)
        self._n_logged = n_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the curve to the trial, because trials are pruned after an evaluation."""
        self._write(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the curve to the trial, so that other workers learn from it."""
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the whole curve to the trial, on the main process."""
        if state.is_world_process_zero:
            self.close()

    def close(self) -> None:
        """Write the curve to the trial. This is done automatically when training ends."""
        self._log.close()

    def _write(self, state: Any) -> None:
        if state.is_world_process_zero:
            self._log.write()
