# ruff: noqa: NPY002 (the legacy random state is what must be kept)
"""The user's model comes back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.spectrum import measure_throughput
from optuna_ttp.task import FineTuningTask
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors


CPU = torch.device("cpu")


class _Restless(torch.nn.Module):
    """Draws random numbers, keeps batch statistics, and writes attributes when it runs."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.cnn = cnn()
        self.gru = torch.nn.GRU(8, 4, batch_first=True)
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(7, 3)
        self.n_calls = 0
        self.last: torch.Tensor | None = None
        self.average: torch.Tensor
        self.register_buffer("average", torch.zeros(()))
        self.to(device)
        self.train()
        self.cnn.get_submodule("4").eval()
        self.dropout.eval()
        self.cnn.get_parameter("0.bias").requires_grad_(False)
        self.head.weight.grad = torch.full_like(self.head.weight, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n_calls += 1
        self.cache = {"inputs": x}
        self.average = self.average * 0.9 + x.mean()
        self.average.add_(1.0)
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.ones(1, device=x.device))
        self.last = self.dropout(torch.cat([self.cnn(x), self.gru(x[:, 0])[1][0]], dim=1))
        torch.rand(1, device=x.device)
        np.random.rand()
        random.random()
        outputs: torch.Tensor = self.head(self.last)
        return outputs


class _RestlessData(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = images()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        torch.rand(1)
        np.random.rand()
        random.random()
        return self.x[i], self.y[i]


class _Interrupted:
    """The model's own forward, which raises at the n-th call."""

    def __init__(self, n_calls: int | None) -> None:
        self.left = n_calls

    def __call__(self, model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        outputs: torch.Tensor = model(inputs)
        return outputs


def _world(model: torch.nn.Module) -> dict[str, Any]:
    """Whatever could have changed. Tensors that should stay the same objects are kept by id."""
    world: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32),
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "attributes": [
            {k: id(v) if isinstance(v, torch.Tensor) else repr(v) for k, v in vars(m).items()}
            for m in model.modules()
        ],
    }
    if torch.cuda.is_available():
        world["cuda"] = torch.cuda.get_rng_state().tolist()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        world[name] = (
            id(tensor),
            tensor.data_ptr(),
            tensor.device,
            tensor.requires_grad,
            tensor._version,
            tensor.tolist(),
            grad,
        )
    for module in model.modules():
        if isinstance(module, torch.nn.GRU):
            world["gru"] = [id(w) for w in module._flat_weights]
    return world


def _construct(task: FineTuningTask, device: torch.device) -> None:
    FineTuningTask(task.model, task._dataset, forward=task.forward)


_LOOKS: dict[str, Callable[[FineTuningTask, torch.device], object]] = {
    "construction": _construct,
    "fingerprint": lambda task, device: task.fingerprint,
    "initial_outputs": lambda task, device: task.initial_outputs(device),
    "compute_spectrum": lambda task, device: compute_spectrum(task, device=device),
    "exact_kernel in blocks": lambda task, device: exact_kernel(
        task, device=device, dtype=torch.float64, max_memory=95_000
    ),
    "measure_throughput": lambda task, device: measure_throughput(
        task, device=device, seconds_per_batch_size=0.0
    ),
}


@pytest.mark.parametrize("look", _LOOKS)
def test_model_comes_back_as_it_was(look: str, device: torch.device) -> None:
    model = _Restless(device)
    before = _world(model)
    task = FineTuningTask(model, _RestlessData())
    assert _world(model) == before
    _LOOKS[look](task, device)
    assert _world(model) == before


@pytest.mark.parametrize(
    ("look", "n_calls"),
    [
        ("construction", 0),
        ("construction", 1),
        ("initial_outputs", 0),
        ("compute_spectrum", 1),
        ("compute_spectrum", 7),
        ("compute_spectrum", 20),
        ("exact_kernel in blocks", 1),
        ("exact_kernel in blocks", 20),
        ("measure_throughput", 0),
        ("measure_throughput", 3),
    ],
)
def test_model_comes_back_as_it_was_after_an_interruption(
    look: str, n_calls: int, device: torch.device
) -> None:
    model = _Restless(device)
    interrupted = _Interrupted(None)
    task = FineTuningTask(model, _RestlessData(), forward=interrupted)
    before = _world(model)
    interrupted.left = n_calls
    with pytest.raises(KeyboardInterrupt):
        _LOOKS[look](task, device)
    assert _world(model) == before


def test_model_comes_back_as_it_was_after_a_gradient_that_is_not_finite(
    device: torch.device,
) -> None:
    model = _Restless(device)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    task = FineTuningTask(model, _RestlessData(), forward=lambda model, x: model(x).abs().sqrt())
    before = _world(model)
    with pytest.raises(ValueError, match="gradient of output 0 of sample 0 must be finite"):
        compute_spectrum(task, device=device)
    assert _world(model) == before


def test_user_keeps_training_as_if_nobody_had_looked() -> None:
    def train(look: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        model = _Restless(CPU)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9)
        x, y = images()
        for step in range(3):
            if look and step == 1:
                compute_spectrum(FineTuningTask(model, (x, y)))
            optimizer.zero_grad()
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        return [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]

    for looked_at, alone in zip(train(True), train(False), strict=True):
        assert torch.equal(looked_at, alone)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_surrounding_modes_do_not_change_the_result(context: Any) -> None:
    task = FineTuningTask(mlp(), vectors(5))
    expected = exact_kernel(task, device=CPU).gram
    with context:
        np.testing.assert_array_equal(exact_kernel(task, device=CPU).gram, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrappers_around_the_model_are_seen_through(wrap: Callable[..., Any]) -> None:
    inner = mlp()
    task = FineTuningTask(wrap(inner), vectors())
    assert task.model is inner
    assert FineTuningTask(inner, vectors()).fingerprint == task.fingerprint
