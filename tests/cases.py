"""Architectures that the Jacobian must be right for, and exactly linear models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
import types
from typing import Any

import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from optuna_ttp.task import Loss
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors


@dataclass(frozen=True)
class Case:
    """A model with its data, and how outputs are made from them."""

    model: torch.nn.Module
    data: Any
    forward: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None


class TwoNames(torch.nn.Module):
    """A layer under two names, called under both, and a table that is another one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(6, 6)
        self.body = torch.nn.Sequential(self.encoder, torch.nn.BatchNorm1d(6))
        self.head = torch.nn.Sequential(torch.nn.Tanh(), self.encoder, torch.nn.Linear(6, 3))
        self.tied = torch.nn.Linear(6, 6, bias=False)
        self.tied.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.tied(self.body(self.encoder(x))))
        return outputs


class TiedWeights(torch.nn.Module):
    """One weight matrix under two names, and one layer that is passed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(6, 6)
        self.decoder = torch.nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(x).tanh()
        outputs: torch.Tensor = self.head(self.decoder(self.encoder(hidden).tanh()))
        return outputs


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(2, 4, batch_first=True)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, last = self.gru(x.reshape(len(x), 3, 2))
        outputs: torch.Tensor = self.head(last[0])
        return outputs


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(2, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x.reshape(len(x), 3, 2))
        mixed, _ = self.attention(hidden, hidden, hidden)
        outputs: torch.Tensor = self.head(self.norm(hidden + mixed).mean(dim=1))
        return outputs


class TextClassifier(torch.nn.Module):
    """Keyword inputs and an output object, as the transformers library has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 5)
        self.head = torch.nn.Linear(5, 3)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> types.SimpleNamespace:
        mask = attention_mask.unsqueeze(2)
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return types.SimpleNamespace(logits=self.head(pooled.tanh()))


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = torch.nn.Linear(6, 4)
        self.right = torch.nn.Linear(1, 4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(torch.tanh(self.left(x) + self.right(z)))
        return outputs


def grouped_cnn() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=2, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2, bias=False),
        torch.nn.GroupNorm(2, 8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 16, 3),
    )


def half_frozen() -> torch.nn.Module:
    model = mlp()
    next(model.parameters()).requires_grad_(False)
    return model


def weight_normed() -> torch.nn.Module:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 5))
    return torch.nn.Sequential(layer, torch.nn.Tanh(), torch.nn.Linear(5, 3))


def sparse_embedding() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 4, sparse=True), torch.nn.Flatten(), torch.nn.Linear(12, 3)
    )


def texts(n_samples: int = 7) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(11, (5,), generator=generator),
            "attention_mask": (torch.arange(5) <= i % 5).long(),
            "labels": i % 3,
        }
        for i in range(n_samples)
    ]


def case(name: str) -> Case:
    """One of the architectures that the Jacobian must be right for."""
    torch.manual_seed(0)
    x, y = vectors(8)
    tokens = torch.randint(11, (7, 3)), torch.arange(7) % 3
    return {
        "mlp": lambda: Case(mlp(), (x, y)),
        "cnn with batch norm and in-place relu": lambda: Case(cnn(), images(6)),
        "tied and shared weights": lambda: Case(TiedWeights(), (x, y)),
        "a layer under two names": lambda: Case(TwoNames(), (x, y)),
        "gru": lambda: Case(Recurrent(), (x, y)),
        "multi-head attention": lambda: Case(Attention(), (x, y)),
        "dict inputs": lambda: Case(TextClassifier(), texts()),
        "two inputs": lambda: Case(
            TwoInputs(), torch.utils.data.TensorDataset(x, torch.randn(8, 1), y)
        ),
        "frozen parameters": lambda: Case(half_frozen(), (x, y)),
        "grouped convolution": lambda: Case(grouped_cnn(), images(6)),
        "weight norm": lambda: Case(weight_normed(), (x, y)),
        "sparse embedding": lambda: Case(sparse_embedding(), tokens),
        "forward adapter": lambda: Case(mlp(), (x, y), lambda m, inputs: 2.0 * m(inputs.abs())),
    }[name]()


CASES = (
    "mlp",
    "cnn with batch norm and in-place relu",
    "tied and shared weights",
    "a layer under two names",
    "gru",
    "multi-head attention",
    "dict inputs",
    "two inputs",
    "frozen parameters",
    "grouped convolution",
    "weight norm",
    "sparse embedding",
    "forward adapter",
)


@cache
def spectrum(
    loss: str | torch.nn.Module | Loss = "cross_entropy",
    n_samples: int = 12,
    n_outputs: int = 3,
    seed: int = 0,
) -> Spectrum:
    """A small spectrum of full rank, of an exactly linear model, in double precision."""
    task = linear_task(loss, n_samples, n_outputs, seed)
    return compute_spectrum(
        task, engine="exact", dtype="float64", measure_speed=False, device="cpu"
    )


def linear_task(
    loss: str | torch.nn.Module | Loss = "cross_entropy",
    n_samples: int = 12,
    n_outputs: int = 3,
    seed: int = 0,
) -> FineTuningTask:
    """A linear layer with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator)
    x = torch.randn(n_samples, 6, generator=generator) @ mixing / 2
    if Loss.from_user(loss).kind == "mse":
        y = torch.randn(n_samples, n_outputs, generator=generator)
    else:
        y = torch.randint(n_outputs, (n_samples,), generator=generator)
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, n_outputs)
    return FineTuningTask(model.double(), (x.double(), y.double() if y.ndim == 2 else y), loss)
