from __future__ import annotations

import copy

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Target
from optuna_ttp.spectrum import Spectrum
from tests.cases import linear_task
from tests.cases import spectrum
from tests.closed_forms import mse_gradient_descent
from tests.dynamics.simulations import double
from tests.dynamics.simulations import LOSSES
from tests.dynamics.simulations import simulate_all
from tests.dynamics.simulations import stable_rate


# Against closed forms


def _heavy_ball_by_its_roots(
    one: Spectrum, learning_rate: float, momentum: float, steps: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Loss of full-batch heavy ball on the MSE: per mode, the recursion's two roots."""
    residual = (one.targets - one.initial_outputs).ravel()
    projections = one.eigenvectors.T @ residual
    outside = residual @ residual - projections @ projections
    total = np.full(len(steps), outside)
    for value, projection in zip(one.eigenvalues, projections, strict=True):
        a = learning_rate * 2.0 * value / residual.size
        z1, z2 = np.roots([1.0, -(1.0 + momentum - a), momentum]).astype(complex)
        share = (1.0 - a - z2) / (z1 - z2)
        x = share * z1**steps + (1.0 - share) * z2**steps
        total += projection**2 * x.real**2
    return total / residual.size


@pytest.mark.parametrize("relative_rate", [1e-3, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("rank", [None, 5])
def test_simulated_mse_equals_the_closed_form(relative_rate: float, rank: int | None) -> None:
    one = spectrum("mse").truncate(rank=rank)
    rate = relative_rate * stable_rate(one)
    curves = simulate_all(LinearisedModel.from_spectrum(one), rate, 12, max_steps=500, exact=True)
    closed = mse_gradient_descent(one, rate, curves.steps[0])
    np.testing.assert_allclose(curves.curves["loss"][0], closed, rtol=1e-4)


@given(
    relative_rate=st.floats(1e-3, 0.99),
    momentum=st.floats(0.0, 0.98),
    rank=st.integers(1, 21),
)
@settings(max_examples=40)
def test_simulated_heavy_ball_equals_the_closed_form_of_its_roots(
    relative_rate: float, momentum: float, rank: int
) -> None:
    one = spectrum("mse").truncate(rank=rank)
    rate = relative_rate * stable_rate(one, momentum)
    curves = simulate_all(double(one), rate, 12, momentum, 80, exact=True)
    expected = _heavy_ball_by_its_roots(one, rate, momentum, curves.steps[0])
    if curves.blown_up[0]:
        # A stable heavy ball may overshoot at first.
        assert expected.max() > 99 * expected[0]
        return
    np.testing.assert_allclose(curves.curves["loss"][0], expected, rtol=1e-6)


# Real training


def _train_with_accuracy(
    loss: torch.nn.Module,
    learning_rate: float,
    batch_size: int,
    momentum: float,
    n_steps: int,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Losses and accuracies over all samples of a linear layer, trained by torch.optim.SGD."""
    task = linear_task(loss)
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    labels = y.argmax(dim=1) if y.ndim == 2 else y
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum)
    generator = torch.Generator().manual_seed(seed)
    losses, accuracies = [], []
    batches: list[torch.Tensor] = []
    for _ in range(n_steps + 1):
        with torch.no_grad():
            losses.append(loss(model(x), y).item())
            accuracies.append((model(x).argmax(dim=1) == labels).double().mean().item())
        if not batches:
            batches = list(torch.randperm(len(x), generator=generator).split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch]), y[batch]))
        optimizer.step()
    return losses, accuracies


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("batch_size", "momentum"), [(1, 0.0), (5, 0.0), (5, 0.9), (12, 0.9)])
def test_simulation_equals_real_training_of_a_linear_model_step_by_step(
    loss: str, batch_size: int, momentum: float
) -> None:
    model = double(spectrum(LOSSES[loss]))
    curves = simulate_all(
        model,
        0.02,
        batch_size,
        momentum,
        60,
        exact=True,
        seed=3,
        target=Target("accuracy", 2.0),
    )
    losses, accuracies = _train_with_accuracy(LOSSES[loss], 0.02, batch_size, momentum, 60, seed=3)
    steps = curves.steps[0].astype(int)
    np.testing.assert_allclose(curves.curves["loss"][0], np.array(losses)[steps], rtol=1e-8)
    np.testing.assert_allclose(curves.curves["accuracy"][0], np.array(accuracies)[steps])


def test_configurations_simulated_together_equal_each_alone() -> None:
    model = double(spectrum())
    rates, batch_sizes = [0.01, 0.2, 0.1, 0.05, 0.3], [12, 4, 5, 4, 12]
    momenta, steps = [0.0, 0.9, 0.5, 0.0, 0.9], [30, 90, 60, 7, 1]
    together = simulate_all(model, rates, batch_sizes, momenta, steps)
    assert together.curves["loss"].shape == together.steps.shape
    for k, configuration in enumerate(zip(rates, batch_sizes, momenta, steps, strict=True)):
        alone = simulate_all(model, *configuration)
        n = alone.curves["loss"].shape[1]
        np.testing.assert_allclose(
            together.curves["loss"][k, :n], alone.curves["loss"][0], rtol=1e-12
        )
        np.testing.assert_array_equal(together.steps[k, :n], alone.steps[0])
        assert np.isnan(together.curves["loss"][k, n:]).all()
        assert np.isnan(together.steps[k, n:]).all()


def test_seed_decides_the_order_of_mini_batches_only() -> None:
    model = double(spectrum())
    first, same, other = (simulate_all(model, 0.1, 5, seed=s).curves["loss"] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(
        simulate_all(model, 0.1, 12, seed=1).curves["loss"],
        simulate_all(model, 0.1, 12, seed=2).curves["loss"],
    )


def test_simulation_draws_no_global_random_number() -> None:
    before = torch.get_rng_state()
    simulate_all(double(spectrum()), 0.1, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_simulation_on_every_device_is_the_same(device: torch.device) -> None:
    expected = simulate_all(double(spectrum()), [0.1, 0.2], 5, 0.5)
    model = LinearisedModel.from_spectrum(spectrum(), device=device)
    actual = simulate_all(model, [0.1, 0.2], 5, 0.5)
    np.testing.assert_allclose(actual.curves["loss"], expected.curves["loss"], rtol=1e-4)


# What is recorded


@given(max_steps=st.integers(1, 2000), batch_size=st.integers(1, 12))
@settings(max_examples=20)
def test_curves_start_at_zero_end_at_the_horizon_and_leave_no_gap(
    max_steps: int, batch_size: int
) -> None:
    model = double(spectrum())
    curves = simulate_all(model, 1e-3, batch_size, max_steps=max_steps, exact=True)
    steps = curves.steps[0]
    assert (steps[0], steps[-1]) == (0, max_steps)
    assert (np.diff(steps) >= 1).all()
    assert (np.diff(steps) <= np.maximum(1, 0.04 * steps[:-1])).all()
    assert curves.curves["loss"][0, 0] == pytest.approx(
        float(model.loss(model.initial_outputs[None]))
    )


def test_curve_ends_where_the_target_is_reached() -> None:
    model = double(spectrum())
    target = Target("loss", 0.8 * float(model.loss(model.initial_outputs[None])))
    ended = simulate_all(model, 0.1, 12, max_steps=500, target=target, exact=True)
    whole = simulate_all(model, 0.1, 12, max_steps=500, exact=True)
    n = ended.curves["loss"].shape[1]
    assert n < whole.curves["loss"].shape[1]
    np.testing.assert_array_equal(ended.curves["loss"][0], whole.curves["loss"][0, :n])
    assert ended.curves["loss"][0, -1] <= target.value < ended.curves["loss"][0, -2]


def test_accuracy_target_ends_a_curve() -> None:
    model = double(spectrum())
    ended = simulate_all(model, 0.1, 12, max_steps=2000, target=Target("accuracy", 0.75))
    assert ended.curves["accuracy"][0, -1] >= 0.75 > ended.curves["accuracy"][0, :-1].max()


@pytest.mark.parametrize("relative_rate", [1.05, 3.0, 1e3, 1e30, 1e300])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unstable_training_blows_up(relative_rate: float, momentum: float) -> None:
    one = spectrum("mse")
    rate = relative_rate * stable_rate(one, momentum)
    curves = simulate_all(
        LinearisedModel.from_spectrum(one), [rate, 1e-3], 12, momentum, max_steps=1000
    )
    assert curves.blown_up.tolist() == [True, False]
    assert np.nanmax(curves.steps[0]) < 1000


def test_training_just_below_the_limit_does_not_blow_up() -> None:
    one = spectrum("mse")
    rate = 0.99 * stable_rate(one)
    curves = simulate_all(LinearisedModel.from_spectrum(one), rate, 12, max_steps=1000)
    assert not curves.blown_up[0]
    assert curves.curves["loss"][0, -1] < curves.curves["loss"][0, 0]
