"""Samples along other axes, and batches of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optuna_ttp import JacobianMismatchError
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import CPU
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


class _SequenceFirst(torch.nn.Module):
    """Samples in the second axis of all layers, as in PyTorch's own tutorials."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 8)
        self.layer = layer
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        if isinstance(self.layer, torch.nn.MultiheadAttention):
            hidden = hidden + self.layer(hidden, hidden, hidden)[0]
        else:
            hidden = self.layer(hidden)
        outputs: torch.Tensor = self.head(hidden.mean(0))
        return outputs


_SEQUENCE_LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "attention": lambda: torch.nn.MultiheadAttention(8, 2),
    "layer": lambda: torch.nn.TransformerEncoderLayer(8, 2, 16),
    "encoder": lambda: torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
    ),
    "linear": lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()),
}


# As many tokens as are looked at first, as there are samples in a batch, and neither.
@pytest.mark.parametrize("n_tokens", [3, 4, 7])
@pytest.mark.parametrize("kind", _SEQUENCE_LAYERS)
def test_layers_whose_samples_lie_along_the_second_axis(
    kind: str, n_tokens: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    model = _SequenceFirst(_SEQUENCE_LAYERS[kind]())
    data = torch.randint(9, (7, n_tokens)), torch.arange(7) % 3
    check_kernel(Case(model, data, lambda model, x: model(x.T)), device)


@pytest.mark.parametrize("n_tokens", [3, 5])
@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
def test_inputs_whose_samples_lie_along_the_second_axis_are_refused(
    engine: str, n_tokens: int
) -> None:
    def collate(items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([x for x, _ in items], 1), torch.tensor([y for _, y in items])

    torch.manual_seed(0)
    tokens = torch.randint(9, (7, n_tokens))
    items: Any = list(zip(tokens, [0, 1, 2, 0, 1, 2, 0], strict=True))
    loader: Any = torch.utils.data.DataLoader(items, 4, collate_fn=collate)
    task = FineTuningTask(_SequenceFirst(_SEQUENCE_LAYERS["layer"]()), loader)
    with pytest.raises(JacobianMismatchError, match="must lie along the first axis of all inputs"):
        compute_spectrum(task, engine=engine, device="cpu", measure_speed=False)


def test_batches_of_different_lengths() -> None:
    """A collate function that pads to the longest sample of a batch."""
    torch.manual_seed(0)
    items = [(torch.randint(1, 9, (1 + n % 5,)), n % 3) for n in range(11)]

    def collate(batch: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence([t for t, _ in batch], batch_first=True)
        return tokens, torch.tensor([y for _, y in batch])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(9, 16, padding_idx=0)
            self.wide = torch.nn.Linear(16, 24, bias=False)
            self.head = torch.nn.Linear(24, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = (tokens != 0)[..., None]
            outputs: torch.Tensor = self.head((self.wide(self.table(tokens)) * mask).sum(1).tanh())
            return outputs

    model = Model()
    loader: Any = torch.utils.data.DataLoader
    task = FineTuningTask(model, loader(items, 4, collate_fn=collate))
    jacobian = brute_force_jacobian(Case(model, collate(items)))
    gram = exact_kernel(task, device=CPU, dtype=torch.float64).gram
    assert relative_error(gram, jacobian @ jacobian.T) < 1e-12
