"""The settings of Adam, and optimisers read from PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optuna_ttp import Adam
from optuna_ttp import AdamW
from optuna_ttp import optimizer_from_torch
from optuna_ttp import ParameterGroup
from optuna_ttp import SGD
from tests.cases import sparse_embedding
from tests.models import mlp


_GROUP = ParameterGroup(("a",))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"betas": (1.0, 0.999)}, ValueError, r"betas\[0\] must be in \[0, 1\) but got 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be in \[0, 1\) but got -0.1"),
        ({"betas": (0.9, math.nan)}, ValueError, r"betas\[1\] must be in \[0, 1\) but got nan"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"betas": 0.9}, TypeError, "betas must be a tuple but got 0.9"),
        ({"betas": ("a", 0.9)}, TypeError, r"betas\[0\] must be a number but got 'a'"),
        ({"eps": 0.0}, ValueError, "eps must be positive but got 0.0"),
        ({"eps": math.inf}, ValueError, "eps must be positive but got inf"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and not negative"),
        ({"max_grad_norm": 0.0}, ValueError, "must be positive but got 0.0. Give None for no"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number but got '1'"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be a positive integer"),
        ({"accumulation_steps": 1.5}, ValueError, "accumulation_steps must be a positive"),
        ({"groups": ()}, TypeError, "groups must be a tuple of ParameterGroup"),
        ({"groups": ("a",)}, TypeError, "groups must be a ParameterGroup but got 'a'"),
        ({"groups": (_GROUP, _GROUP)}, ValueError, "must not share parameters but got 'a' twice"),
        ({"amsgrad": True}, TypeError, "amsgrad"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    kinds: list[Any] = [Adam, AdamW]
    if set(arguments) <= {"max_grad_norm", "accumulation_steps", "groups"}:
        kinds.append(SGD)
    for kind in kinds:
        with pytest.raises(error, match=message):
            kind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names": "a"}, TypeError, "names must be a tuple but got 'a'"),
        ({"names": (1,)}, TypeError, "names must be the names of parameters but got 1"),
        ({"names": ("a",), "rate": -1.0}, ValueError, "rate must be finite and not negative"),
        ({"names": ("a",), "weight_decay": -1.0}, ValueError, "weight_decay must"),
    ],
    ids=str,
)
def test_groups_out_of_range_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ParameterGroup(**arguments)


def test_defaults_are_those_of_torch() -> None:
    weights = [torch.zeros(1, requires_grad=True)]
    assert optimizer_from_torch(torch.optim.AdamW(weights)) == AdamW()
    assert optimizer_from_torch(torch.optim.Adam(weights)) == Adam()
    assert optimizer_from_torch(torch.optim.SGD(weights)) == SGD(0.0)


def test_an_optimiser_of_torch_is_read_with_its_settings() -> None:
    model = mlp()
    weights = model.parameters()
    adam = torch.optim.AdamW(weights, 1e-4, (0.8, 0.95), 1e-6, 0.1, fused=False, foreach=True)
    assert optimizer_from_torch(adam, model, max_grad_norm=1.0, accumulation_steps=4) == AdamW(
        (0.8, 0.95), eps=1e-6, weight_decay=0.1, max_grad_norm=1.0, accumulation_steps=4
    )
    decoupled = torch.optim.Adam(model.parameters(), decoupled_weight_decay=True)
    assert optimizer_from_torch(decoupled) == AdamW(weight_decay=0.0)
    sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-4)
    assert optimizer_from_torch(sgd) == SGD(0.9, nesterov=True, weight_decay=1e-4)


@pytest.mark.parametrize("with_model", [True, False])
def test_groups_are_read_by_name_and_relative_to_the_first_rate(with_model: bool) -> None:
    model = mlp()
    named = list(model.named_parameters())
    adam = torch.optim.AdamW(
        [
            {"params": named[:2], "lr": 1e-4, "weight_decay": 0.0},
            {"params": named[2:], "lr": 1e-3},
        ]
    )
    # What a scheduler has done so far does not count.
    torch.optim.lr_scheduler.LinearLR(adam, 0.1, 1.0)
    read = optimizer_from_torch(adam, model if with_model else None)
    body, head = read.groups or ()
    assert body == ParameterGroup(("0.weight", "0.bias"), 1.0, 0.0)
    assert (head.names, head.weight_decay) == (("2.weight", "2.bias"), 0.01)
    assert head.rate == pytest.approx(10.0)


def test_groups_that_do_not_differ_are_one() -> None:
    model = mlp()
    parameters = list(model.parameters())
    adam = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], 1e-4)
    assert optimizer_from_torch(adam, model).groups is None


def _two(model: torch.nn.Module, **second: Any) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:2]}, {"params": parameters[2:], **second}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "amsgrad must be False"),
        (lambda m: torch.optim.SGD(m.parameters(), maximize=True), "maximize must be False"),
        (lambda m: torch.optim.Adam(m.parameters(), differentiable=True), "differentiable must"),
        (lambda m: torch.optim.AdamW(list(m.parameters())[:2]), "got none for '2.weight', '2.bi"),
        (
            lambda m: torch.optim.AdamW(_two(m, betas=(0.5, 0.9))),
            "All parameter groups must have the same betas",
        ),
        (
            lambda m: torch.optim.AdamW([*m.parameters(), torch.zeros(3, requires_grad=True)]),
            r"one of shape \(3,\) that the model lacks",
        ),
        (lambda m: torch.optim.AdamW(_two(m, lr=1.0), lr=0.0), "must be positive but got 0.0"),
    ],
    ids=["amsgrad", "maximize", "differentiable", "missing", "betas", "foreign", "zero"],
)
def test_what_is_not_simulated_is_refused(make: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        optimizer_from_torch(make(model), model)


def test_groups_without_names_need_the_model() -> None:
    optimizer = torch.optim.AdamW(_two(mlp(), lr=1.0))
    with pytest.raises(ValueError, match="Give the model, too"):
        optimizer_from_torch(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.NAdam])
def test_another_optimiser_is_refused_by_name(kind: Any) -> None:
    message = f"torch.optim.AdamW, which can be simulated, but got {kind.__name__}"
    with pytest.raises(TypeError, match=message):
        optimizer_from_torch(kind(mlp().parameters()))


def test_sparse_gradients_are_refused_under_adam() -> None:
    model = sparse_embedding()
    with pytest.raises(ValueError, match="got sparse ones of '0', a Embedding"):
        optimizer_from_torch(torch.optim.Adam(model.parameters()), model)
    assert optimizer_from_torch(torch.optim.SGD(model.parameters()), model) == SGD(0.0)
