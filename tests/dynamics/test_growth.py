from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import StabilityLimit
from tests.cases import spectrum
from tests.dynamics.simulations import double
from tests.dynamics.simulations import OPTIMISERS
from tests.dynamics.simulations import simulated


def test_growth_is_interpolated_in_logarithms_and_constant_beyond_its_ends() -> None:
    growth = KernelGrowth(np.array([1.0, 0.5, 0.25]), np.array([1.0, 4.0, 2.0]))
    fractions = np.array([[3.0, 1.0, 2**-0.5], [0.5, 0.25, 1e-9], [0.0, 2**-1.5, math.inf]])
    expected = [[1.0, 1.0, 2.0], [4.0, 2.0, 2.0], [2.0, 8**0.5, 1.0]]
    np.testing.assert_allclose(growth.at(fractions), expected)


# In a simulation


def _grown(rate: float, momentum: float = 0.0, *, limited: bool = True) -> Any:
    """Simulate a kernel that grows tenfold, a learning rate in units of the stability limit."""
    model = LinearisedModel.from_spectrum(spectrum("mse"))
    limit = StabilityLimit.of(model)
    largest = float(limit.max_learning_rate(np.array([12]), np.array([momentum]))[0])
    growth = KernelGrowth(np.array([1.0, 0.7, 0.1]), np.array([1.0, 3.0, 10.0]))
    return simulate(
        model,
        SGDConfigurations.of([rate * largest], momentum),
        np.array([12]),
        max_steps=np.array([2000]),
        growth=growth,
        limit=limit if limited else None,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.95])
def test_a_kernel_grows_up_to_the_edge_of_stability_only(rate: float, momentum: float) -> None:
    assert _grown(rate, momentum, limited=False).blown_up[0]
    held = _grown(rate, momentum)
    assert not held.blown_up[0]
    losses = held.curves["loss"][0]
    assert losses[-1] < 0.5 * losses[0]


def test_far_from_the_edge_a_kernel_grows_as_predicted() -> None:
    free, held = _grown(0.05, limited=False), _grown(0.05)
    np.testing.assert_array_equal(free.curves["loss"], held.curves["loss"])


def test_a_learning_rate_above_the_limit_blows_up_as_with_a_frozen_kernel() -> None:
    assert _grown(1.5).blown_up[0]


@pytest.mark.parametrize("optimiser", ["none", "dampening", "nesterov and weight decay"])
def test_growing_kernel_multiplies_every_step(optimiser: str) -> None:
    options = OPTIMISERS.get(optimiser, {})
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    model = double(spectrum())
    assert model.pull is not None
    growth = KernelGrowth(np.array([1.0, 0.8, 0.5]), np.array([1.0, 2.0, 3.0]))
    # Every step is recorded, and so looked at, up to the 25th.
    curves = simulated(model, 12, 24, growth=growth, learning_rate=0.05, **options)
    theta = torch.zeros(1, model.rank, dtype=torch.float64)
    velocity = torch.zeros_like(theta)
    losses, factors = [], []
    for step in range(25):
        losses.append(float(model.loss(model.outputs(theta))))
        # What has grown stays so while the loss swings.
        depth = -math.log(min(losses) / losses[0])
        logs = np.interp(depth, -np.log([1.0, 0.8, 0.5]), np.log([1.0, 2.0, 3.0]))
        factors.append(math.exp(logs))
        gradient = model.gradient(theta) + options.get("weight_decay", 0.0) * (model.pull + theta)
        # The Jacobian has grown by the root: once where the gradient is taken, once where it acts.
        gradient = math.sqrt(factors[-1]) * gradient
        velocity = momentum * velocity + (1.0 - dampening if step else 1.0) * gradient
        ahead = gradient + momentum * velocity if options.get("nesterov") else velocity
        theta = theta - math.sqrt(factors[-1]) * 0.05 * ahead
    np.testing.assert_allclose(curves.curves["loss"][0], losses, rtol=1e-9)
    assert max(factors) > 1.2
