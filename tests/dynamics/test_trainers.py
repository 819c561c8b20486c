"""Trainers that people use, on a linear model, against the simulation of what they do."""

from __future__ import annotations

from collections.abc import Iterator
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp import optimizer_from_torch
from optuna_ttp import Schedule
from optuna_ttp import SGD
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import simulate
from tests.cases import linear_task
from tests.cases import spectrum
from tests.columns import with_columns


_RATE, _BATCH_SIZE, _ACCUMULATED, _EPOCHS = 0.05, 2, 4, 5


class _Shuffled(torch.utils.data.Sampler[int]):
    """The orders of the samples that the simulation draws, one per epoch."""

    def __init__(self, n_samples: int) -> None:
        self._n_samples = n_samples
        self._generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._n_samples, generator=self._generator).tolist()

    def __len__(self) -> int:
        return self._n_samples


def _full_loss(model: torch.nn.Module) -> float:
    x, y = linear_task()._dataset.tensors
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(x), y).item()


def _simulated(
    optimizer: Optimizer, rate: float, n_steps: int, schedule: Schedule
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    model = LinearisedModel.from_columns(
        with_columns(spectrum(), linear_task()), dtype=torch.float64
    )
    curves = simulate(
        model,
        optimizer.configurations(rate, optimizer.default_momentum or 0.0, schedule),
        np.array([_BATCH_SIZE]),
        max_steps=np.array([n_steps]),
        exact=True,
        seed=3,
    )
    return curves.steps[0].astype(np.int64), curves.curves["loss"][0]


class _Classifier(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_trainer_of_transformers_is_simulated_exactly(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    losses: list[float] = []

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            losses.append(_full_loss(model.network))  # type: ignore[arg-type]

    class Ordered(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return _Shuffled(len(self.train_dataset))

    x, y = linear_task()._dataset.tensors
    trainer = Ordered(
        _Classifier(copy.deepcopy(linear_task().model)),
        transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=_BATCH_SIZE,
            gradient_accumulation_steps=_ACCUMULATED,
            learning_rate=_RATE,
            weight_decay=0.1,
            max_grad_norm=0.5,
            lr_scheduler_type=kind,
            warmup_steps=2,
            num_train_epochs=_EPOCHS,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        callbacks=[Recorder()],
    )
    trainer.train()
    losses.append(_full_loss(trainer.model.network))
    assert trainer.optimizer is not None
    optimizer = optimizer_from_torch(
        trainer.optimizer, trainer.model, max_grad_norm=0.5, accumulation_steps=_ACCUMULATED
    )
    # The trainer's model has the layer under a name of its own; its bias is not decayed.
    groups = optimizer.groups
    assert groups is not None
    assert {group.weight_decay for group in groups} == {0.0, 0.1}
    renamed = tuple(
        type(group)(
            tuple(name.removeprefix("network.") for name in group.names),
            group.rate,
            group.weight_decay,
        )
        for group in groups
    )
    optimizer = replace(optimizer, groups=renamed)
    schedule = Schedule.trainer(kind, n_epochs=_EPOCHS, warmup_steps=2)
    n_steps = len(losses) - 1
    assert n_steps == 2 * _EPOCHS
    steps, simulated = _simulated(optimizer, _RATE, n_steps, schedule)
    np.testing.assert_allclose(simulated, np.array(losses)[steps], rtol=1e-9)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_trainer_of_lightning_is_simulated_exactly(name: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    losses: list[float] = []

    def made(model: torch.nn.Module) -> torch.optim.Optimizer:
        if name == "SGD":
            return torch.optim.SGD(model.parameters(), _RATE, 0.9, weight_decay=0.1)
        return torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.1)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(linear_task().model)

        def training_step(self, batch: Any, *_: Any) -> torch.Tensor:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.network(x), y)

        def on_before_optimizer_step(self, *_: Any) -> None:
            losses.append(_full_loss(self.network))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return made(self.network)

    x, y = linear_task()._dataset.tensors
    # Lightning divides by the number of accumulated mini-batches also where an epoch ends early,
    # so that here an epoch has a whole number of steps.
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=2, sampler=_Shuffled(len(x))
    )
    trainer = lightning.Trainer(
        max_epochs=_EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=3,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    module = Module()
    trainer.fit(module, loader)
    losses.append(_full_loss(module.network))
    network = linear_task().model
    optimizer = optimizer_from_torch(
        made(network), network, max_grad_norm=0.5, accumulation_steps=3
    )
    assert isinstance(optimizer, SGD) == (name == "SGD")
    steps, simulated = _simulated(optimizer, _RATE, len(losses) - 1, Schedule())
    np.testing.assert_allclose(simulated, np.array(losses)[steps], rtol=1e-9)
