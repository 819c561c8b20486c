"""Saturation against brute force: how far large first steps move the outputs."""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import measure_saturation
from optuna_ttp.spectrum import Saturation
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.cases import CASES
from tests.cases import linear_task
from tests.models import mlp
from tests.models import separated
from tests.models import vectors
from tests.probes import probed_spectrum


_CPU = torch.device("cpu")


def _measured(task: FineTuningTask, seed: int = 0) -> Saturation:
    spectrum = probed_spectrum(task, probe=False)
    return measure_saturation(task, spectrum, device=_CPU, dtype=torch.float64, seed=seed)


def _reference(
    network: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    batch: NDArray[np.int64],
    rates: NDArray[np.float64],
    multipliers: dict[str, float],
    *,
    adam: bool = False,
    weights: torch.Tensor | None = None,
) -> tuple[list[float], list[float]]:
    """Ratios and cosines of real changes and those of forward mode, weighted by rows."""
    start = {n: p.detach() for n, p in network.named_parameters()}

    def outputs(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(torch.func.functional_call(network, w, (x,)))

    def loss(w: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = outputs(w)[batch]
        if y.is_floating_point():
            return torch.nn.functional.mse_loss(predicted, y[batch])
        return torch.nn.functional.cross_entropy(predicted, y[batch])

    gradient = torch.func.grad(loss)(start)
    direction = {
        n: -multipliers.get(n, 1.0) * (g / (g.abs() + 1e-8) if adam else g)
        for n, g in gradient.items()
    }
    before, tangent, *_ = torch.func.jvp(outputs, (start,), (direction,))
    ratios, cosines = [], []
    of_rows = torch.ones(len(x), 1) if weights is None else weights
    for rate in rates:
        there = {n: w + rate * direction[n] for n, w in start.items()}
        real = (of_rows.sqrt() * (outputs(there) - before)).ravel()
        linear = (of_rows.sqrt() * rate * tangent).ravel()
        ratios.append(float(real @ linear / (linear @ linear)))
        cosines.append(float(real @ linear / (real.norm() * linear.norm())))
    return ratios, cosines


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("multipliers", [{}, {"0.weight": 5.0, "2.bias": 0.2}], ids=str)
def test_all_samples_of_a_small_task_are_compared(
    loss: str, multipliers: dict[str, float]
) -> None:
    network = mlp().double()
    x, y = separated(12)
    x = x.double()
    y = torch.nn.functional.one_hot(y, 3).double() if loss == "mse" else y
    task = FineTuningTask(network, (x, y), loss, learning_rate_multipliers=multipliers)
    one = _measured(task)
    assert one.reason == ""
    np.testing.assert_array_equal(one.sgd_batch_sizes, [6, 6, 12])
    ratios, cosines = _reference(network, x, y, np.arange(12), one.sgd_rates, multipliers)
    np.testing.assert_allclose(one.sgd_ratios[2], ratios, rtol=0.02)
    np.testing.assert_allclose(one.sgd_cosines[2], cosines, rtol=0.02, atol=0.02)
    assert abs(ratios[-1] - 1.0) > 0.1


@pytest.mark.parametrize("multipliers", [{}, {"0.weight": 5.0, "2.bias": 0.2}], ids=str)
def test_adam_goes_along_the_sign_of_the_gradient(multipliers: dict[str, float]) -> None:
    network = mlp().double()
    x, y = vectors(1)
    x = x.double()
    task = FineTuningTask(network, (x, y), learning_rate_multipliers=multipliers)
    one = _measured(task)
    np.testing.assert_array_equal(one.adam_batch_sizes, [1])
    batch = np.arange(1)
    ratios, cosines = _reference(network, x, y, batch, one.adam_rates, multipliers, adam=True)
    np.testing.assert_allclose(one.adam_ratios[0], ratios, rtol=1e-3)
    np.testing.assert_allclose(one.adam_cosines[0], cosines, rtol=1e-3)
    assert abs(ratios[-1] - 1.0) > 1e-3


def test_samples_outside_of_a_batch_stand_for_all_others() -> None:
    network = mlp().double()
    x, y = separated(40)
    task = FineTuningTask(network, (x.double(), y))
    one = _measured(task, seed=3)
    np.testing.assert_array_equal(one.sgd_batch_sizes, [8, 8, 16])
    part = task.subset(16, seed=3)
    ((inputs, targets),) = part.batches(16, _CPU, torch.float64)
    batch = np.random.default_rng(3).permutation(16)[:8]
    weights = torch.full((16, 1), 4.0, dtype=torch.float64)
    weights[batch] = 1.0
    ratios, cosines = _reference(
        network, inputs, targets, batch, one.sgd_rates, {}, weights=weights
    )
    np.testing.assert_allclose(one.sgd_ratios[0], ratios, rtol=0.02)
    np.testing.assert_allclose(one.sgd_cosines[0], cosines, rtol=0.02)


def test_weighted_classes_have_their_share_in_the_gradient_of_all() -> None:
    network = mlp().double()
    x, y = separated(12)
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5]).double())
    weighted = _measured(FineTuningTask(network, (x.double(), y), loss))
    start = {n: p.detach() for n, p in network.named_parameters()}

    def outputs(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(torch.func.functional_call(network, w, (x.double(),)))

    gradient = torch.func.grad(lambda w: loss(outputs(w), y))(start)
    before, tangent, *_ = torch.func.jvp(outputs, (start,), (gradient,))
    for rate, ratio in zip(weighted.sgd_rates, weighted.sgd_ratios[2], strict=True):
        real = before - outputs({n: w - rate * gradient[n] for n, w in start.items()})
        expected = float((real * tangent).sum() / (rate * tangent * tangent).sum())
        assert ratio == pytest.approx(expected, rel=0.02)


def test_a_linear_network_does_not_saturate() -> None:
    one = _measured(linear_task())
    for table in (one.sgd_ratios, one.sgd_cosines, one.adam_ratios, one.adam_cosines):
        np.testing.assert_allclose(table, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_measured_and_left_alone(name: str) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    plain = probed_spectrum(task, probe=False)
    before = copy.deepcopy(task.model.state_dict())
    modes = [m.training for m in task.model.modules()]
    state = torch.get_rng_state()
    saturation = measure_saturation(task, plain, device=_CPU)
    assert len(saturation.sgd_batch_sizes) == 3
    assert (saturation.sgd_cosines[:, 0] > 0.5).all()
    after = task.model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert all(p.grad is None for p in task.model.parameters())
    assert [m.training for m in task.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_under_a_head_of_zeros_adam_is_not_measured() -> None:
    network = mlp()
    with torch.no_grad():
        network.get_parameter("2.weight").zero_()
    one = _measured(FineTuningTask(network, vectors(8)))
    assert one.adam_ratios.shape == (0, len(one.adam_rates))
    assert "to 1 weight matrices, the first one 'model.0.weight', is zero" in one.reason
    # Only the head moves, on which the outputs depend linearly.
    np.testing.assert_allclose(one.sgd_ratios, 1.0, atol=1e-6)


def test_without_a_gradient_nothing_is_measured() -> None:
    network = mlp().double()
    x, _ = vectors(8)
    with torch.no_grad():
        y = network(x.double())
    one = _measured(FineTuningTask(network, (x.double(), y), "mse"))
    assert one.sgd_ratios.shape == (0, len(one.sgd_rates))
    assert one.adam_ratios.shape == (0, len(one.adam_rates))
    assert one.reason == "The gradient of the loss at the pretrained weights is zero."


class _Exponential(torch.nn.Module):
    """Outputs that overflow after a large step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1e-4, 2e-4]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1e5 * x @ self.weight).exp()


def test_ratios_of_outputs_that_overflow_are_zero() -> None:
    task = FineTuningTask(_Exponential(), (torch.ones(4, 1), torch.tensor([0, 1, 0, 0])))
    spectrum = compute_spectrum(task, engine="exact", measure_speed=False, probe=False)
    one = measure_saturation(task, spectrum, device=_CPU)
    assert 0.0 in one.adam_ratios


def test_a_spectrum_with_a_probe_carries_its_saturation() -> None:
    task = FineTuningTask(mlp(), separated(12))
    assert probed_spectrum(task, probe=False).saturation is None
    one = probed_spectrum(task)
    assert one.saturation is not None
    expected = measure_saturation(task, one, device=_CPU, dtype=torch.float64)
    for name, values in vars(one.saturation).items():
        np.testing.assert_array_equal(getattr(expected, name), values)
