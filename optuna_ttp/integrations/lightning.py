"""Record the training loss of Lightning's ``Trainer``."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from optuna_ttp.study import TrainingLog


try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "optuna_ttp.integrations.lightning needs the package lightning: pip install lightning"
    ) from error


if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer
    import optuna


class TrainingLogCallback(Callback):
    """Records the loss that ``training_step`` returns with a :class:`~optuna_ttp.TrainingLog`.

    One loss is recorded per optimiser step; if gradients are accumulated, it is the mean over the
    batches of the step. With manual optimisation, ``training_step`` has to return a dictionary
    with the key ``"loss"``.

    The curve is written to the trial when fitting ends, also by an exception such as
    :exc:`optuna.TrialPruned`, and each time the number of recorded losses has doubled.

    Example:
        >>> def objective(trial):
        ...     model = Classifier(
        ...         learning_rate=trial.suggest_float("learning_rate", 1e-3, 1.0, log=True)
        ...     )
        ...     trainer = lightning.Trainer(
        ...         max_epochs=5, callbacks=[TrainingLogCallback(trial)]
        ...     )
        ...     trainer.fit(model, loader)
        ...     return float(trainer.callback_metrics["val_loss"])

    Args:
        trial:
            The trial of the objective.
    """

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._log = TrainingLog(trial)
        self._n_done = 0
        self._losses: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the first step to the trainer's, which is not zero if training is resumed."""
        self._n_done = trainer.global_step
        self._losses.clear()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Collect a batch's loss, and after an optimiser step record the mean of its batches."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            # The trainer has divided it by the number of batches that it accumulates.
            accumulated = (
                trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            )
            self._losses.append(loss * accumulated)
        if trainer.global_step <= self._n_done:
            return
        if self._losses and trainer.is_global_zero:
            self._log.step(sum(self._losses) / len(self._losses), step=self._n_done)
        self._losses.clear()
        self._n_done = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the whole curve to the trial."""
        if trainer.is_global_zero:
            self._log.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the curve to the trial, because predictions learn from pruned trials, too."""
        if trainer.is_global_zero:
            self._log.write()
