"""The fine-tuning tasks that searches are compared on, and the grids that are recorded of them.

Networks and data are those of :mod:`benchmarks.accuracy.tasks`, with samples held out for
validation. Learning rates go from hopelessly slow to diverging.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
import math

import numpy as np
import torch
import torch.nn.functional as functional

from benchmarks.accuracy import tasks
from optuna_ttp import demo


_BATCH_SIZES = (8, 16, 32, 128)
_MOMENTA = (0.0, 0.5, 0.9, 0.99)
_N_TRAIN = {"digits": 200, "residual": 250, "rotation": 250}
_N_VALIDATION = 250
_PER_CLASS = {"efficientnet": 26, "minilm": 16}
# Rotations are drawn from this range, and the target is the share of it.
_LARGEST_ANGLE = 45.0


@dataclass(frozen=True)
class Grid:
    """What is recorded of a task.

    Attributes:
        learning_rates:
            Ascending, equally spaced in the logarithm.
        batch_sizes:
            Ascending.
        momenta:
            Ascending.
        n_epochs:
            Passes over the training data of a run.
    """

    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    momenta: tuple[float, ...]
    n_epochs: int

    def configurations(self) -> list[tuple[float, int, float]]:
        """Return learning rate, batch size and momentum of every run."""
        return [
            (rate, batch_size, momentum)
            for rate in self.learning_rates
            for batch_size in self.batch_sizes
            for momentum in self.momenta
        ]


@dataclass(frozen=True, eq=False)
class SearchTask:
    """A network to fine-tune, data to train and to validate on, and a grid.

    Attributes:
        tuning:
            The network and the training data.
        validation_inputs:
            Inputs of the samples that are not trained on.
        validation_labels:
            Their labels or targets.
        grid:
            The configurations.
    """

    tuning: tasks.Tuning
    validation_inputs: torch.Tensor
    validation_labels: torch.Tensor
    grid: Grid


def load(name: str) -> SearchTask:
    """Build a task by its name, always the same one for the same name.

    Args:
        name:
            ``"digits-DRAW"``, ``"residual-DRAW"``, ``"rotation-DRAW"``, ``"efficientnet-DRAW"``
            or ``"minilm-DRAW"``, with the number of a random draw of classes, samples and head.

    Returns:
        The task.
    """
    kind, _, draw = name.rpartition("-")
    builders: dict[str, Callable[[str, int], SearchTask]] = {
        "digits": _digits,
        "residual": _residual,
        "rotation": _rotation,
        "efficientnet": _efficientnet,
        "minilm": _minilm,
    }
    if kind not in builders or not draw.isdecimal():
        known = ", ".join(f"{k}-DRAW" for k in builders)
        raise ValueError(f"The task must be one of {known} but got {name!r}.")
    return builders[kind](name, int(draw))


def _digits(name: str, draw: int) -> SearchTask:
    tuning = tasks.load(name)
    n = _N_TRAIN["digits"]
    images, labels = demo.pretrain(draw, n_train=n + _N_VALIDATION).train
    grid = Grid(_rates(1e-4, 1.0, 14), _BATCH_SIZES, _MOMENTA, n_epochs=20)
    return SearchTask(tuning, images[n:], labels[n:], grid)


def _residual(name: str, draw: int) -> SearchTask:
    grid = Grid(_rates(3e-4, 3.0, 14), _BATCH_SIZES, _MOMENTA, n_epochs=15)
    n = _N_TRAIN["residual"]
    return _split(tasks.residual(name, draw, n_samples=n + _N_VALIDATION), n, grid)


def _rotation(name: str, draw: int) -> SearchTask:
    """How far a picture was turned: mean squared error, one real output."""
    grid = Grid(_rates(1e-4, 1.0, 14), _BATCH_SIZES, _MOMENTA, n_epochs=15)
    n = _N_TRAIN["rotation"]
    whole = tasks.residual(name, draw, n_samples=n + _N_VALIDATION)
    generator = torch.Generator().manual_seed(draw)
    shares = 2.0 * torch.rand(len(whole.labels), generator=generator) - 1.0
    model = whole.model
    assert isinstance(model, tasks.ResidualNetwork)
    with torch.random.fork_rng():
        torch.manual_seed(draw)
        model.head = torch.nn.Linear(model.head.in_features, 1)
    turned = replace(
        whole,
        model=model.eval(),
        inputs=_rotated(whole.inputs, shares * _LARGEST_ANGLE),
        labels=shares[:, None],
        loss=functional.mse_loss,
    )
    return _split(turned, n, grid)


def _efficientnet(name: str, draw: int) -> SearchTask:
    grid = Grid(_rates(1e-4, 1.0, 12), (8, 32, 128), (0.0, 0.9), n_epochs=10)
    n = _PER_CLASS["efficientnet"]
    whole = tasks.efficientnet(name, *tasks.fashion_mnist(), draw, per_class=2 * n)
    return _split_by_class(whole, n, grid)


def _minilm(name: str, draw: int) -> SearchTask:
    grid = Grid(_rates(3e-4, 1.0, 15), (8, 32), (0.0, 0.9), n_epochs=6)
    n = _PER_CLASS["minilm"]
    return _split_by_class(tasks.minilm(name, draw, per_class=2 * n), n, grid)


def _split(whole: tasks.Tuning, n_train: int, grid: Grid) -> SearchTask:
    everything = torch.arange(len(whole.labels))
    return _held_out(whole, everything < n_train, grid)


def _split_by_class(whole: tasks.Tuning, per_class: int, grid: Grid) -> SearchTask:
    """The samples come class by class, twice as many as are trained on."""
    place = torch.arange(len(whole.labels)) % (2 * per_class)
    return _held_out(whole, place < per_class, grid)


def _held_out(whole: tasks.Tuning, trained: torch.Tensor, grid: Grid) -> SearchTask:
    tuning = replace(whole, inputs=whole.inputs[trained], labels=whole.labels[trained])
    return SearchTask(tuning, whole.inputs[~trained], whole.labels[~trained], grid)


def _rotated(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    angles = degrees * (math.pi / 180.0)
    zeros = torch.zeros_like(angles)
    rows = [
        torch.stack([angles.cos(), -angles.sin(), zeros], dim=1),
        torch.stack([angles.sin(), angles.cos(), zeros], dim=1),
    ]
    places = functional.affine_grid(
        torch.stack(rows, dim=1), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, places, align_corners=False)


def _rates(lowest: float, highest: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{rate:.4g}") for rate in np.geomspace(lowest, highest, count))
