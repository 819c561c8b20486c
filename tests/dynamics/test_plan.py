from __future__ import annotations

from functools import cache
import math
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import Target
from optuna_ttp.spectrum import Spectrum
from tests.cases import spectrum
from tests.closed_forms import mse_gradient_descent
from tests.dynamics.simulations import double
from tests.dynamics.simulations import simulate_all
from tests.dynamics.simulations import simulated


def _wide_spectrum(loss: str) -> Spectrum:
    """Eigenvalues that fall as a power law over three decades."""
    return spectrum(loss, n_samples=40, seed=2)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(("batch_size", "momentum"), [(40, 0.0), (8, 0.0), (8, 0.9), (40, 0.98)])
def test_time_with_strides_is_within_two_per_cent_of_the_exact_one(
    loss: str, batch_size: int, momentum: float
) -> None:
    model = double(_wide_spectrum(loss))
    initial = float(model.loss(model.initial_outputs[None]))
    rate = 0.01 * (1.0 - momentum) / float(model.curvatures[0])
    least = (
        simulate_all(model, 1.0 / float(model.curvatures[0]), 40, max_steps=2000)
        .curves["loss"]
        .min()
    )
    strides = []
    for share in (0.9, 0.6, 0.4, 0.2):
        target = Target("loss", least + share * (initial - least))
        times = []
        for exact in (True, False):
            curves = simulate_all(
                model, rate, batch_size, momentum, 20_000, target=target, exact=exact
            )
            times.append(target.first_passage(curves.steps[0], curves.curves["loss"][0]))
        assert math.isfinite(times[0])
        assert times[1] == pytest.approx(times[0], rel=0.02)
        strides.append(int(curves.strides[0]))
    assert strides == sorted(strides)
    assert strides[-1] >= 4


@pytest.mark.parametrize("momentum", [0.8, 0.9])
def test_coarse_steps_keep_the_rate_of_the_heavy_ball_to_second_order(momentum: float) -> None:
    one = spectrum("mse").truncate(rank=1)
    h = float(double(one).curvatures[0])
    rate = 0.02 * (1.0 - momentum) / h
    curves = simulate_all(double(one), rate, 12, momentum, 1000)
    assert curves.strides[0] == 8
    least = mse_gradient_descent(one, 1.0 / h, [10_000])[0]
    late = (curves.steps[0] > 100) & (curves.curves["loss"][0] > least * (1 + 1e-9))
    slope = np.polyfit(curves.steps[0][late], np.log(curves.curves["loss"][0][late] - least), 1)[0]
    slow_root = np.roots([1.0, -(1.0 + momentum - rate * h), momentum]).max()
    assert slope == pytest.approx(2 * np.log(slow_root), rel=0.03)


@given(
    log_rate=st.floats(-8, 2),
    momentum=st.floats(0, 0.999),
    max_steps=st.integers(1, 100),
)
@settings(max_examples=60)
def test_strides_are_powers_of_two_within_their_bounds(
    log_rate: float, momentum: float, max_steps: int
) -> None:
    model = double(spectrum())
    rate = 10.0**log_rate
    curves = simulate_all(model, rate, 12, momentum, max_steps)
    stride = int(curves.strides[0])
    assert stride & (stride - 1) == 0
    if stride > 1:
        assert stride * rate / (1 - momentum) * model.curvatures[0] <= 0.25 * (1 + 1e-9)
        assert stride <= max_steps / 64


@cache
def _wide() -> LinearisedModel:
    """Eigenvalues that fall as a power law over three decades."""
    return double(spectrum("cross_entropy", n_samples=40, seed=2))


_SLOW: dict[str, dict[str, Any]] = {
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "weight decay": {"momentum": 0.5, "weight_decay": 0.02},
    "cosine": {"momentum": 0.9, "schedule": Schedule.cosine(4000)},
    "warm-up": {"momentum": 0.0, "schedule": Schedule.cosine(4000, warmup_steps=400)},
    "epochs": {"momentum": 0.8, "schedule": Schedule.step(70, 0.7, every="epoch")},
    "replacement": {"momentum": 0.0, "sampling": "replacement"},
}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        *((name, 8) for name in _SLOW if name != "replacement"),
        *((name, 40) for name in ("nesterov", "cosine", "replacement")),
    ],
)
def test_time_with_strides_of_any_optimiser_is_close_to_the_exact_one(
    name: str, batch_size: int
) -> None:
    options = _SLOW[name]
    dampening = options.get("dampening", 0.0)
    # Nothing is coarse where the steepest direction moves by more than an eighth in a step.
    effective = 0.01 / float(_wide().curvatures[0])
    rate = effective * (1.0 - options["momentum"]) / (1.0 - dampening)
    exact = simulated(_wide(), batch_size, 4000, learning_rate=rate, **options)
    losses = exact.curves["loss"][0]
    least = losses.min()
    for share in (0.5, 0.25, 0.1):
        target = Target("loss", least + share * (losses[0] - least))
        coarse = simulated(
            _wide(), batch_size, 4000, learning_rate=rate, target=target, exact=False, **options
        )
        expected = target.first_passage(exact.steps[0], losses)
        assert coarse.first_passage_times(target)[0] == pytest.approx(expected, rel=0.03)
    assert coarse.strides[0] >= 4


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("factor", [4.0, 50.0])
def test_strides_of_a_growing_kernel_stay_stable(factor: float, loss: str) -> None:
    model = double(spectrum(loss, n_samples=40, seed=2))
    growth = KernelGrowth(np.array([1.0, 0.9, 0.8]), np.array([1.0, 2.0, factor]))
    rate = 0.01 / float(model.curvatures[0])
    exact = simulated(model, 40, 2000, learning_rate=rate, growth=growth)
    losses = exact.curves["loss"][0]
    target = Target("loss", losses.min() + 0.04 * (losses[0] - losses.min()))
    coarse = simulated(
        model, 40, 2000, learning_rate=rate, target=target, exact=False, growth=growth
    )
    assert not exact.blown_up.any()
    expected = target.first_passage(exact.steps[0], losses)
    assert coarse.first_passage_times(target)[0] == pytest.approx(expected, rel=0.03)
