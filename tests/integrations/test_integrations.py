"""The callbacks in the real trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest
import torch

from optuna_ttp import UnusableCurveWarning
from optuna_ttp.study import observed_curve
from optuna_ttp.study._attributes import CURVE
from tests.models import mlp
from tests.models import separated


N_SAMPLES, BATCH_SIZE, RATE = 48, 8, 0.05


def _plain_losses(n_steps: int, batch_size: int = BATCH_SIZE) -> list[float]:
    """The losses before each step of SGD, in the order of the samples."""
    x, y = separated(N_SAMPLES)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    batches = list(torch.arange(N_SAMPLES).split(batch_size))
    losses = []
    for step in range(n_steps):
        batch = batches[step % len(batches)]
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return losses


def _recorded(
    monkeypatch: pytest.MonkeyPatch, train: Callable[[optuna.Trial], None]
) -> tuple[optuna.trial.FrozenTrial, list[tuple[int, float]]]:
    """The trial, and what was recorded in it step by step."""
    from optuna_ttp import TrainingLog

    calls: list[tuple[int, float]] = []
    original = TrainingLog.step

    def noted(log: TrainingLog, loss: Any, step: int) -> None:
        calls.append((step, float(loss)))
        original(log, loss, step)

    monkeypatch.setattr(TrainingLog, "step", noted)
    study = optuna.create_study()

    def objective(trial: optuna.Trial) -> float:
        train(trial)
        return 0.0

    study.optimize(objective, n_trials=1, catch=(RuntimeError,))
    return study.trials[0], calls


# transformers


class _Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def _hugging_face(trial: optuna.Trial, folder: Path, *callbacks: Any, **settings: Any) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from optuna_ttp.integrations.transformers import TrainingLogCallback

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    x, y = separated(N_SAMPLES)
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 30,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_nan_inf_filter": False,
        **settings,
    }
    trainer = InOrder(
        _Classifier(),
        transformers.TrainingArguments(**arguments),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        eval_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        callbacks=[TrainingLogCallback(trial), *callbacks],
    )
    trainer.train()


def test_hugging_faces_trainer_records_each_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trial, calls = _recorded(monkeypatch, lambda trial: _hugging_face(trial, tmp_path))
    assert [step for step, _ in calls] == list(range(30))
    np.testing.assert_allclose([loss for _, loss in calls], _plain_losses(30), atol=2e-4)
    curve = observed_curve(trial)
    assert curve is not None and curve.n_steps == 30
    assert curve.losses[-1] < 0.8 * curve.losses[0]


def test_hugging_faces_trainer_records_the_mean_of_an_interval_at_its_middle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, calls = _recorded(
        monkeypatch,
        lambda trial: _hugging_face(trial, tmp_path, logging_steps=5, logging_first_step=True),
    )
    losses = _plain_losses(30)
    # Steps 0, 1 to 4, 5 to 9 and so on.
    assert [step for step, _ in calls] == [0, 2, 7, 12, 17, 22, 27]
    intervals = [(0, 1), (1, 5), *((k, k + 5) for k in range(5, 30, 5))]
    expected = [float(np.mean(losses[a:b])) for a, b in intervals]
    np.testing.assert_allclose([loss for _, loss in calls], expected, atol=2e-4)


def test_hugging_faces_trainer_counts_optimiser_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, calls = _recorded(
        monkeypatch,
        lambda trial: _hugging_face(
            trial,
            tmp_path,
            max_steps=12,
            per_device_train_batch_size=BATCH_SIZE // 2,
            gradient_accumulation_steps=2,
        ),
    )
    assert [step for step, _ in calls] == list(range(12))
    np.testing.assert_allclose([loss for _, loss in calls], _plain_losses(12), atol=2e-4)


def test_a_trial_that_is_pruned_on_an_evaluation_keeps_its_curve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")

    class Prune(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            raise optuna.TrialPruned

    trial, calls = _recorded(
        monkeypatch,
        lambda trial: _hugging_face(
            trial, tmp_path, Prune(), eval_strategy="steps", eval_steps=10
        ),
    )
    assert trial.state == TrialState.PRUNED
    assert len(calls) == 10
    curve = observed_curve(trial)
    assert curve is not None and curve.n_steps == 10


def test_only_the_first_process_of_hugging_faces_trainer_records() -> None:
    pytest.importorskip("transformers")
    from optuna_ttp.integrations.transformers import TrainingLogCallback

    study = optuna.create_study()
    trial = study.ask()
    callback = TrainingLogCallback(trial)
    other = SimpleNamespace(global_step=3, is_world_process_zero=False)
    callback.on_log(None, other, None, {"loss": 1.0})
    callback.on_train_end(None, other, None)
    assert study.trials[0].user_attrs == {}
    # Logs without a training loss are not for us.
    first = SimpleNamespace(global_step=4, is_world_process_zero=True)
    for logs in (None, {"eval_loss": 1.0}, {"train_loss": 1.0}):
        callback.on_log(None, first, None, logs)
    with pytest.warns(UnusableCurveWarning, match="it is empty"):
        callback.on_train_end(None, first, None)
    assert study.trials[0].user_attrs[CURVE]["kind"] == "empty"


# Lightning


def _lightning(
    trial: optuna.Trial,
    folder: Path,
    fail_at: int | None = None,
    error: type[BaseException] = RuntimeError,
    batch_size: int = BATCH_SIZE,
    **settings: Any,
) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from optuna_ttp.integrations.lightning import TrainingLogCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == fail_at:
                raise error
            x, y = batch
            return torch.nn.functional.cross_entropy(self.network(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), RATE)

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*separated(N_SAMPLES)), batch_size
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TrainingLogCallback(trial)],
        **{"max_steps": 30, **settings},
    )
    trainer.fit(Classifier(), loader)


def test_lightnings_trainer_records_each_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trial, calls = _recorded(monkeypatch, lambda trial: _lightning(trial, tmp_path))
    assert [step for step, _ in calls] == list(range(30))
    np.testing.assert_allclose([loss for _, loss in calls], _plain_losses(30), rtol=1e-5)
    curve = observed_curve(trial)
    assert curve is not None and curve.n_steps == 30


def test_lightnings_trainer_records_the_mean_over_accumulated_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, calls = _recorded(
        monkeypatch,
        lambda trial: _lightning(
            trial,
            tmp_path,
            batch_size=BATCH_SIZE // 2,
            accumulate_grad_batches=2,
            max_steps=12,
        ),
    )
    assert [step for step, _ in calls] == list(range(12))
    np.testing.assert_allclose([loss for _, loss in calls], _plain_losses(12), rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "state"),
    [(optuna.TrialPruned, TrialState.PRUNED), (RuntimeError, TrialState.FAIL)],
)
def test_a_trial_that_stops_in_lightnings_trainer_keeps_its_curve(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: type[BaseException],
    state: TrialState,
) -> None:
    trial, calls = _recorded(
        monkeypatch, lambda trial: _lightning(trial, tmp_path, fail_at=10, error=error)
    )
    assert trial.state == state
    assert len(calls) == 10
    curve = observed_curve(trial)
    assert curve is not None and curve.n_steps == 10


# Imports


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_missing_package_is_named(name: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{name!r}] = None\n"
        "import optuna_ttp.integrations\n"
        f"import optuna_ttp.integrations.{name}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ImportError: optuna_ttp.integrations.{name} needs the package" in done.stderr
    assert f"pip install {name}" in done.stderr
