"""The network of the demo: its data, its pretraining and its training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


Data = tuple[torch.Tensor, torch.Tensor]
N_TRAIN = 200


@dataclass(frozen=True, eq=False)
class FineTuning:
    """A pretrained network with a new head, and the data to fine-tune it on.

    Attributes:
        model: A network that was pretrained on the digits 0 to 4 and has a new head for 5 to 9.
        train: Images of shape ``(N, 1, 8, 8)`` and labels of shape ``(N,)``.
    """

    model: torch.nn.Module
    train: Data


def pretrain(seed: int = 0, *, steps: int = 300, n_train: int = N_TRAIN) -> FineTuning:
    """Return the network, pretrained for ``steps`` optimiser steps, with a new head, and its data.

    ``seed`` determines the weights, the split of the data and the batches; ``n_train`` is the
    number of samples to fine-tune on.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(64, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(64 * 16, 5),
        )
        data = _digits(range(5), generator)
        for _ in train(model, data, 0.05, 32, 0.9, steps, generator):
            pass
        model[-1] = torch.nn.Linear(64 * 16, 5)
    images, labels = _digits(range(5, 10), generator)
    return FineTuning(model, (images[:n_train], labels[:n_train]))


def train(
    model: torch.nn.Module,
    data: Data,
    learning_rate: float,
    batch_size: int,
    momentum: float,
    steps: int,
    generator: torch.Generator,
) -> Iterator[float]:
    """Train a model with SGD in place, and yield the mini-batch loss before each of ``steps``."""
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    model.train()
    step = 0
    while True:
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(batch_size):
            if step == steps:
                return
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield loss.item()


def _digits(classes: range, generator: torch.Generator) -> Data:
    """Return images ``(N, 1, 8, 8)`` of consecutive digits, shuffled, with labels from zero on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The demo needs scikit-learn and matplotlib: pip install 'optuna_ttp[demo]'."
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    labels = torch.as_tensor(digits) - classes.start
    chosen = torch.nonzero((labels >= 0) & (labels < len(classes))).flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    return images[chosen], labels[chosen]
