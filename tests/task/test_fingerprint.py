"""What the fingerprint of a task depends on."""

from __future__ import annotations

from collections.abc import Callable
import copy
import functools
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import torch
from torch.utils.data import TensorDataset

from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.cases import CASES
from tests.cases import TextClassifier
from tests.cases import texts
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors


CPU = torch.device("cpu")


def _fingerprint(model: torch.nn.Module, data: Any = None, **arguments: Any) -> str:
    return FineTuningTask(model, vectors() if data is None else data, **arguments).fingerprint


def test_fingerprint_is_a_sha256_of_the_weights_as_they_are_now() -> None:
    model = mlp()
    task = FineTuningTask(model, vectors())
    before = task.fingerprint
    assert len(bytes.fromhex(before)) == 32
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    assert task.fingerprint != before
    with torch.no_grad():
        model.get_parameter("0.weight").sub_(1.0)


def test_fingerprint_stays_with_mode_name_and_copy() -> None:
    model = cnn()
    before = _fingerprint(model, images())
    assert _fingerprint(model.train(), images()) == before
    assert _fingerprint(model.eval(), images()) == before
    assert _fingerprint(model, images(), name="another") == before
    assert _fingerprint(copy.deepcopy(model), images()) == before
    assert _fingerprint(model, TensorDataset(*images())) == before


@given(name=st.sampled_from(sorted(dict(cnn().state_dict()))), data=st.data())
@settings(max_examples=40)
def test_fingerprint_changes_with_any_single_weight_or_buffer(
    name: str, data: st.DataObject
) -> None:
    model = cnn()
    model.get_parameter("0.weight").requires_grad_(False)
    before = _fingerprint(model, images())
    state = model.state_dict()
    index = data.draw(st.integers(0, state[name].numel() - 1))
    values = state[name].view(-1)
    changed = (
        values[index] + 1
        if name.endswith("tracked")
        else torch.nextafter(values[index], -values[index])
    )
    values[index] = changed
    assert _fingerprint(model, images()) != before


@pytest.mark.parametrize("index", [0, 63, 64, 69])
def test_fingerprint_changes_with_any_sample_or_label(index: int) -> None:
    x, y = vectors(70)
    before = _fingerprint(mlp(), (x, y))
    changed = x.clone()
    changed[index, 3] += 1e-6
    assert _fingerprint(mlp(), (changed, y)) != before
    changed = y.clone()
    changed[index] = (changed[index] + 1) % 3
    assert _fingerprint(mlp(), (x, changed)) != before
    assert _fingerprint(mlp(), (x[:-1], y[:-1])) != before
    order = torch.arange(70).roll(1)
    assert _fingerprint(mlp(), (x[order], y[order])) != before


def test_fingerprint_changes_with_the_loss_and_its_settings() -> None:
    x, y = vectors()
    losses: list[Any] = [
        "cross_entropy",
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.nn.CrossEntropyLoss(label_smoothing=0.2),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])),
    ]
    assert len({_fingerprint(mlp(), (x, y), loss=loss) for loss in losses}) == len(losses)
    same = _fingerprint(mlp(), (x, y), loss=torch.nn.CrossEntropyLoss())
    assert same == _fingerprint(mlp(), (x, y))


def test_fingerprint_changes_with_what_is_trainable() -> None:
    model = mlp()
    before = _fingerprint(model)
    model.get_parameter("0.bias").requires_grad_(False)
    assert _fingerprint(model) != before


class _Scaled(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.scale * self.inner(x)
        return outputs


def _scaling(scale: float) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: scale * model(x)


def _scaled_by(scale: float, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = scale * model(x)
    return outputs


class _ScalesBy:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _scaled_by(self.scale, model, x)

    __call__ = forward


def test_fingerprint_changes_with_settings_of_the_model_that_are_no_weights() -> None:
    assert _fingerprint(_Scaled(1.0)) != _fingerprint(_Scaled(2.0))
    assert _fingerprint(_Scaled(1.0)) == _fingerprint(_Scaled(1.0))
    relu, gelu = (
        torch.nn.Sequential(torch.nn.Linear(6, 3), activation)
        for activation in (torch.nn.ReLU(), torch.nn.GELU())
    )
    gelu.load_state_dict(relu.state_dict())
    assert _fingerprint(relu) != _fingerprint(gelu)


def test_fingerprint_changes_with_the_code_of_the_model() -> None:
    def build(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.nn.Module:
        kind = type("Model", (_Scaled,), {"forward": forward})
        model: torch.nn.Module = kind(1.0)
        return model

    doubled = build(lambda self, x: self.inner(2.0 * x))
    tripled = build(lambda self, x: self.inner(3.0 * x))
    assert _fingerprint(doubled) != _fingerprint(tripled)


@pytest.mark.parametrize(
    "make",
    [
        _scaling,
        lambda scale: functools.partial(_scaled_by, scale),
        lambda scale: eval(f"lambda model, x: {scale} * model(x)"),
        lambda scale: eval(f"lambda model, x, s={scale}: s * model(x)"),
        lambda scale: _ScalesBy(scale).forward,
        _ScalesBy,
    ],
    ids=["closure", "partial", "constant", "default", "method", "callable object"],
)
def test_fingerprint_changes_with_what_forward_does(make: Callable[[float], Any]) -> None:
    assert _fingerprint(mlp(), forward=make(1.0)) == _fingerprint(mlp(), forward=make(1.0))
    assert _fingerprint(mlp(), forward=make(1.0)) != _fingerprint(mlp(), forward=make(2.0))
    assert _fingerprint(mlp(), forward=make(1.0)) != _fingerprint(mlp())


def test_fingerprint_stays_while_forward_counts_its_calls() -> None:
    calls: list[int] = []

    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        outputs: torch.Tensor = model(x)
        return outputs

    task = FineTuningTask(mlp(), vectors(), forward=forward)
    before = task.fingerprint
    task.initial_outputs(CPU)
    assert len(calls) > 0
    assert task.fingerprint == before


def constants_of_any_order(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A set of strings, whose order depends on the process, among the function's constants."""
    arguments = {k: v for k, v in inputs.items() if k in {"input_ids", "attention_mask", "a", "b"}}
    outputs: torch.Tensor = model(**arguments).logits
    return outputs


def all_fingerprints() -> list[str]:
    named = [case(name) for name in CASES]
    return [
        _fingerprint(TextClassifier_seeded(), texts(), forward=constants_of_any_order),
        *(_fingerprint(c.model, c.data, forward=c.forward) for c in named),
    ]


def TextClassifier_seeded() -> torch.nn.Module:
    torch.manual_seed(0)
    return TextClassifier()


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from tests.task.test_fingerprint import all_fingerprints; print(*all_fingerprints())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert other.stdout.split() == all_fingerprints()
