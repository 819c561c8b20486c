from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import linear_task
from tests.dynamics.simulations import assert_follows
from tests.dynamics.simulations import double
from tests.dynamics.simulations import LOSSES
from tests.dynamics.simulations import OPTIMISERS
from tests.dynamics.simulations import simulated
from tests.dynamics.simulations import train
from tests.models import mlp
from tests.models import vectors


class _TwoParts(torch.nn.Module):
    """A linear model of two layers, side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = torch.nn.Linear(4, 3)
        self.head = torch.nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.body(x[:, :4]) + self.head(x[:, 4:])
        return outputs


_MULTIPLIERS = {"body.": 0.5, "head": 4.0, "head.bias": 2.0}
_GROUPS = {"body.weight": 0.5, "body.bias": 0.5, "head.weight": 4.0, "head.bias": 2.0}


def _grouped_task(multipliers: dict[str, float] | None = None) -> FineTuningTask:
    plain = linear_task()
    return FineTuningTask(
        _TwoParts().double(), plain._dataset.tensors, learning_rate_multipliers=multipliers
    )


def _spectrum(task: FineTuningTask) -> Spectrum:
    return compute_spectrum(
        task, engine="exact", dtype="float64", measure_speed=False, device="cpu", probe=False
    )


@pytest.mark.parametrize("batch_size", [5, 12])
@pytest.mark.parametrize("optimiser", ["none", "dampening", "nesterov"])
def test_multipliers_are_parameter_groups(optimiser: str, batch_size: int) -> None:
    options = OPTIMISERS.get(optimiser, {})
    task = _grouped_task(_MULTIPLIERS)
    loss = LOSSES["cross-entropy"]
    losses = train(task, loss, batch_size, groups=_GROUPS, **options)
    assert not np.allclose(losses, train(task, loss, batch_size, **options), rtol=1e-3)
    assert_follows(simulated(double(_spectrum(task)), batch_size, **options), losses, 1e-7)


def test_kernel_with_multipliers_is_the_weighted_sum_of_the_groups_kernels() -> None:
    x, y = vectors(7)
    model = mlp().double()
    task = FineTuningTask(
        model, (x.double(), y), learning_rate_multipliers={"0.": 3.0, "2.weight": 0.25}
    )
    factors = {"0.weight": 3.0, "0.bias": 3.0, "2.weight": 0.25, "2.bias": 1.0}
    kernel = np.zeros((21, 21))
    weights = {n: p.detach() for n, p in model.named_parameters()}
    jacobians = torch.func.jacrev(
        lambda w: torch.func.functional_call(model, w, (x.double(),)).reshape(-1)
    )(weights)
    contributions = np.zeros(21)
    for name, jacobian in jacobians.items():
        rows = jacobian.reshape(21, -1)
        kernel += factors[name] * (rows @ rows.T).numpy()
        contributions += factors[name] * (rows @ weights[name].reshape(-1)).numpy()
    one = _spectrum(task)
    rebuilt = (one.eigenvectors * one.eigenvalues) @ one.eigenvectors.T
    np.testing.assert_allclose(rebuilt, kernel, atol=1e-10 * kernel.max())
    assert one.trace == pytest.approx(np.trace(kernel))
    # Where weight decay pulls from.
    assert one.weight_outputs is not None
    np.testing.assert_allclose(one.weight_outputs.ravel(), contributions, rtol=1e-9)


@pytest.mark.parametrize("optimiser", ["weight decay", "nesterov and weight decay"])
def test_weight_decay_with_one_multiplier_for_all_is_that_of_another_learning_rate(
    optimiser: str,
) -> None:
    options = OPTIMISERS[optimiser]
    task = _grouped_task({"": 3.0})
    loss = LOSSES["cross-entropy"]
    losses = train(task, loss, 5, learning_rate=0.06, **options)
    assert_follows(simulated(double(_spectrum(task)), 5, **options), losses, 1e-7)


def test_weight_decay_with_multipliers_is_nearly_that_of_parameter_groups() -> None:
    task = _grouped_task(_MULTIPLIERS)
    options: dict[str, Any] = {"momentum": 0.8, "weight_decay": 0.05}
    losses = train(task, LOSSES["cross-entropy"], 12, groups=_GROUPS, **options)
    without = train(task, LOSSES["cross-entropy"], 12, groups=_GROUPS, momentum=0.8)
    curves = simulated(double(_spectrum(task)), 12, **options)
    error = np.abs(curves.curves["loss"][0] - losses[curves.steps[0].astype(int)]).max()
    assert error < 0.1 * np.abs(losses - without).max()


def test_multipliers_of_one_change_nothing() -> None:
    plain, same = _grouped_task(), _grouped_task({"body": 1.0, "head": 1.0})
    np.testing.assert_array_equal(_spectrum(plain).eigenvalues, _spectrum(same).eigenvalues)
    assert plain.fingerprint == same.fingerprint


def test_fingerprint_tells_multipliers_apart() -> None:
    prints = [
        _grouped_task(m).fingerprint
        for m in (None, {"body": 2.0}, {"head": 2.0}, {"body": 3.0}, {"": 2.0})
    ]
    assert len(set(prints)) == 5
    # The same multipliers by another name.
    assert _grouped_task({"body": 2.0, "head": 2.0}).fingerprint == prints[-1]
    assert _grouped_task({"body.": 2.0}).fingerprint == prints[1]


def test_fingerprint_tells_validation_data_apart() -> None:
    task = linear_task()
    x, y = task._dataset.tensors
    prints = [
        FineTuningTask(task.model, (x, y), validation_data=data).fingerprint
        for data in (None, (x[:5], y[:5]), (x[:6], y[:6]), (x[:5] + 1.0, y[:5]))
    ]
    assert len(set(prints)) == 4
    assert prints[0] == task.fingerprint


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_multiplier_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"multipliers must be positive but got .* for 'head'"):
        _grouped_task({"head": factor})


@pytest.mark.parametrize("multipliers", [[2.0], {"": "2"}, {"": None}])
def test_multipliers_of_another_kind_are_refused(multipliers: Any) -> None:
    with pytest.raises(TypeError, match="learning_rate_multipliers must be"):
        _grouped_task(multipliers)


@pytest.mark.parametrize("name", ["heads.", "weight", "body.weight.x"])
def test_multiplier_of_no_parameter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"but got '{name}'. Names are like body.weight"):
        _grouped_task({name: 2.0})


def test_multiplier_of_a_frozen_parameter_is_refused() -> None:
    model = _TwoParts()
    model.head.requires_grad_(False)
    x, y = vectors(5)
    with pytest.raises(ValueError, match="trainable parameter's name but got 'head'"):
        FineTuningTask(model, (x, y), learning_rate_multipliers={"head": 2.0})
