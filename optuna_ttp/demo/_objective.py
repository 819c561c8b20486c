"""The objective of the demo."""

from __future__ import annotations

from collections.abc import Callable
import copy
import math

import optuna
import torch

from optuna_ttp.demo._training import FineTuning
from optuna_ttp.demo._training import train
from optuna_ttp.spectrum import Throughput
from optuna_ttp.study import TrainingLog


BATCH_SIZES = (8, 16, 32, 64, 128)
MAX_EPOCHS = 30


def make_objective(
    tuning: FineTuning, *, target_loss: float, throughput: Throughput, seed: int
) -> Callable[[optuna.Trial], float]:
    """Return an objective, as a user would write it, for the fastest fine-tuning of a network.

    Its value is the number of seconds of training until the mean of the last five mini-batch
    losses is at or below ``target_loss``. A trial that needs more than 30 epochs is pruned.
    ``throughput`` turns steps into seconds, so that values do not depend on how busy the machine
    is. ``seed`` determines the order of the samples.
    """

    def objective(trial: optuna.Trial) -> float:
        learning_rate = trial.suggest_float("learning_rate", 1e-5, 10.0, log=True)
        batch_size = trial.suggest_categorical("batch_size", BATCH_SIZES)
        momentum = trial.suggest_float("momentum", 0.0, 0.99)
        if trial.should_prune():
            raise optuna.TrialPruned
        model = copy.deepcopy(tuning.model)
        generator = torch.Generator().manual_seed(seed + trial.number)
        per_epoch = math.ceil(len(tuning.train[0]) / batch_size)
        losses: list[float] = []
        with TrainingLog(trial) as log:
            for loss in train(
                model,
                tuning.train,
                learning_rate,
                batch_size,
                momentum,
                MAX_EPOCHS * per_epoch,
                generator,
            ):
                losses.append(loss)
                log.step(loss)
                if not math.isfinite(loss):
                    raise optuna.TrialPruned
                if len(losses) >= 5 and sum(losses[-5:]) / 5 <= target_loss:
                    return len(losses) * float(throughput.seconds_per_step(batch_size))
                if len(losses) % per_epoch == 0:
                    trial.report(sum(losses[-per_epoch:]) / per_epoch, len(losses) // per_epoch)
                    if trial.should_prune():
                        raise optuna.TrialPruned
        raise optuna.TrialPruned

    return objective
