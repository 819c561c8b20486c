"""Small networks and data that the tests share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import Spectrum
from optuna_ttp import Throughput
from optuna_ttp import TrainingTimePredictor


def mlp(n_inputs: int = 6, n_outputs: int = 3, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(n_inputs, 16), torch.nn.Tanh(), torch.nn.Linear(16, n_outputs)
    )


def cnn(n_outputs: int = 3, seed: int = 0) -> torch.nn.Module:
    """A convolutional network with batch norm whose statistics are not the initial ones."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, padding=1),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(inplace=True),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, n_outputs),
    )
    with torch.no_grad():
        model(torch.randn(64, 1, 8, 8))
    return model


def vectors(
    n_samples: int = 20, n_inputs: int = 6, n_outputs: int = 3, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, n_inputs, generator=generator)
    return x, torch.randint(n_outputs, (n_samples,), generator=generator)


def images(
    n_samples: int = 12, n_outputs: int = 3, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, 1, 8, 8, generator=generator)
    return x, torch.randint(n_outputs, (n_samples,), generator=generator)


@cache
def small_spectrum() -> Spectrum:
    """The spectrum of a small network on well separated classes, with a made-up throughput."""
    x, y = separated(24)
    task = FineTuningTask(mlp(), (x, y), name="small")
    spectrum = compute_spectrum(task, measure_speed=False, show_progress_bar=False)
    throughput = Throughput(np.array([1, 24]), np.array([0.001, 0.002]), "cpu")
    return replace(spectrum, throughput=throughput)


@cache
def small_predictor() -> TrainingTimePredictor:
    """A predictor whose response surface is built in a moment, shared by the tests."""
    return TrainingTimePredictor(small_spectrum(), target_fraction=0.5, max_steps=2000)


def separated(
    n_samples: int, n_inputs: int = 6, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes, each around a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n_samples) % 3
    x = torch.randn(n_samples, n_inputs, generator=generator) * 0.3
    x[torch.arange(n_samples), y] += 2.0
    return x, y
