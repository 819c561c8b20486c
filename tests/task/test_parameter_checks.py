"""Models whose weights cannot be used are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optuna_ttp.task import FineTuningTask
from tests.models import mlp
from tests.models import vectors


def test_model_without_trainable_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a trainable parameter but got 0 parameters"):
        FineTuningTask(torch.nn.Flatten(), vectors())
    with pytest.raises(ValueError, match="must have a trainable parameter but got 4 parameters"):
        FineTuningTask(mlp().requires_grad_(False), vectors())


def test_uninitialised_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lazy parameters \(weight, bias\)"):
        FineTuningTask(torch.nn.LazyLinear(3), vectors())


def test_complex_parameters_are_refused() -> None:
    model = torch.nn.Linear(6, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match="'weight' is complex"):
        FineTuningTask(model, vectors())


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_gradients_by_frequency_in_the_batch_are_refused_by_name(layer: Any) -> None:
    table, head = layer(20, 6, scale_grad_by_freq=True), torch.nn.LazyLinear(3)
    model = torch.nn.Sequential()
    model.add_module("table", table)
    model.add_module("flat", torch.nn.Flatten())
    model.add_module("head", head)
    data = torch.arange(12).reshape(4, 3), torch.arange(4) % 3
    model(data[0])
    with pytest.raises(ValueError, match="'table' has scale_grad_by_freq=True"):
        FineTuningTask(model, data)
    table.requires_grad_(False)
    in_head = sum(p.numel() for p in head.parameters())
    assert FineTuningTask(model, data).n_parameters == in_head


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(mlp(), torch.zeros(1, 6))
    for model in (traced, torch.nn.Sequential(traced)):
        with pytest.raises(TypeError, match="TorchScript modules are not supported"):
            FineTuningTask(model, vectors())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("trainable", [True, False])
def test_weights_that_are_not_finite_are_refused(value: float, trainable: bool) -> None:
    model = mlp()
    torch.nn.init.constant_(model.get_parameter("2.bias"), value).requires_grad_(trainable)
    with pytest.raises(ValueError, match=r"weights must be finite but '2\.bias' is not"):
        FineTuningTask(model, vectors())


def test_what_holds_no_numbers_is_refused() -> None:
    x, y = vectors(6)
    with torch.device("meta"):
        empty = torch.nn.Linear(6, 3)
    offloaded = mlp()
    offloaded.register_buffer("scale", torch.ones(1, device="meta"))
    for model, data, what in (
        (empty, (x, y), "The model's weights and buffers .'weight'."),
        (offloaded, (x, y), "The model's weights and buffers .'scale'."),
        (mlp(), (x.to("meta"), y), "The data"),
        (mlp(), (x, y.to("meta")), "The data"),
    ):
        with pytest.raises(ValueError, match=f"{what} must hold numbers but got .* meta device"):
            FineTuningTask(model, data)


def test_a_model_that_was_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = torch.nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"'weight' was made under torch\.inference_mode"):
        FineTuningTask(model, vectors(4))
