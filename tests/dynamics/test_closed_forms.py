from __future__ import annotations

import copy

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from tests.cases import linear_task
from tests.cases import spectrum
from tests.closed_forms import mse_gradient_descent
from tests.closed_forms import mse_gradient_flow
from tests.dynamics.simulations import LOSSES
from tests.dynamics.simulations import OPTIMISERS
from tests.dynamics.simulations import stable_rate
from tests.dynamics.simulations import train


def test_mse_closed_form_equals_gradient_descent_on_the_weights() -> None:
    task = linear_task("mse")
    rate = 0.7 * stable_rate(spectrum("mse"))
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), rate)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    closed = mse_gradient_descent(spectrum("mse"), rate, np.arange(60))
    np.testing.assert_allclose(closed, losses, rtol=1e-9)


def test_gradient_flow_is_the_limit_of_small_steps() -> None:
    one = spectrum("mse")
    rate = 0.2 * stable_rate(one)
    flow = mse_gradient_flow(one, rate, [10, 40])
    errors = [
        np.abs(mse_gradient_descent(one, rate / n, [10 * n, 40 * n]) - flow).max()
        for n in (10, 100, 1000)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_gradient_flow_equals_equation_5_of_zancato_et_al() -> None:
    """There the loss is half the sum of squares, `L_t = sum_k exp(-2 eta lambda_k t) p_k`."""
    one = spectrum("mse").truncate(rank=6)
    dy = (one.targets - one.initial_outputs).ravel()
    p = (dy @ one.eigenvectors) ** 2
    t, eta = 7.0, 0.05
    ours = mse_gradient_flow(one, eta * dy.size / 2.0, [t])[0] * dy.size
    theirs = (np.exp(-2.0 * eta * one.eigenvalues * t) * p).sum()
    assert ours == pytest.approx(theirs + dy @ dy - p.sum(), rel=1e-12)


def test_closed_form_is_that_of_the_mse() -> None:
    with pytest.raises(ValueError, match="mean squared error but got 'cross_entropy'"):
        mse_gradient_descent(spectrum(), 0.1, [1])


@pytest.mark.parametrize(
    "optimiser", [k for k, v in OPTIMISERS.items() if "weight_decay" not in v]
)
def test_closed_form_is_full_batch_sgd(optimiser: str) -> None:
    options = OPTIMISERS[optimiser]
    losses = train(linear_task("mse"), LOSSES["mse"], 12, 100, **options)
    closed = mse_gradient_descent(spectrum("mse"), 0.02, np.arange(101), **options)
    np.testing.assert_allclose(closed, losses, rtol=1e-9)


@given(
    relative_rate=st.floats(1e-3, 0.99),
    momentum=st.floats(0.0, 0.98),
    dampening=st.sampled_from([0.0, 0.1, 0.6]),
    nesterov=st.booleans(),
)
@settings(max_examples=80)
def test_closed_form_is_the_sum_over_the_roots_of_each_recursion(
    relative_rate: float, momentum: float, dampening: float, nesterov: bool
) -> None:
    assume(not (nesterov and dampening))
    one = spectrum("mse")
    residual = (one.targets - one.initial_outputs).ravel()
    projections = one.eigenvectors.T @ residual
    curvatures = 2.0 * one.eigenvalues / residual.size
    rate = relative_rate * 2.0 * (1.0 + momentum) / curvatures[0]
    rate /= 1.0 + 2.0 * momentum if nesterov else 1.0
    steps = np.arange(40)
    total = np.full(40, residual @ residual - projections @ projections)
    for curvature, projection in zip(curvatures, projections, strict=True):
        a = rate * curvature
        if nesterov:
            polynomial = [1.0, -(1.0 + momentum) * (1.0 - a), momentum * (1.0 - a)]
            first = 1.0 - (1.0 + momentum) * a
        else:
            damped = a * (1.0 - dampening if momentum else 1.0)
            polynomial = [1.0, -(1.0 + momentum - damped), momentum]
            first = 1.0 - a
        z1, z2 = np.roots(polynomial).astype(complex)
        assume(abs(z1 - z2) > 1e-3)
        share = (first - z2) / (z1 - z2)
        x = share * z1**steps + (1.0 - share) * z2**steps
        total += projection**2 * x.real**2
    closed = mse_gradient_descent(
        one, rate, steps, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    np.testing.assert_allclose(closed, total / residual.size, rtol=1e-7)
