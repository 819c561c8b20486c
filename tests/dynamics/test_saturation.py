"""Simulated steps that move the outputs less far because they are large."""

from __future__ import annotations

from functools import cache
from itertools import combinations
import math

import numpy as np
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Saturation
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import simulate
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.columns import with_columns
from tests.models import mlp
from tests.models import separated


_N = 12


@cache
def _task() -> FineTuningTask:
    x, y = separated(_N)
    return FineTuningTask(mlp().double(), (x.double(), y))


@cache
def _spectrum() -> Spectrum:
    return compute_spectrum(
        _task(), dtype="float64", measure_speed=False, probe=False, device="cpu"
    )


@cache
def _model() -> LinearisedModel:
    return LinearisedModel.from_spectrum(_spectrum(), dtype=torch.float64)


def _losses(
    model: LinearisedModel,
    optimizer: SGD,
    rate: float,
    saturation: Saturation | None,
    batch_size: int = _N,
) -> list[float]:
    curves = simulate(
        model,
        optimizer.configurations(rate, optimizer.default_momentum or 0.0),
        np.array([batch_size]),
        max_steps=np.array([30]),
        exact=True,
        saturation=saturation,
    )
    return [float(loss) for loss in curves.curves["loss"][0]]


_TABLE = Saturation(
    np.array([0.01, 0.1, 1.0]),
    np.array([[0.9, 0.6, 0.1], [1.0, 0.7, 0.3]]),
    np.array([4.0, float(_N)]),
)


@pytest.mark.parametrize(("momentum", "rate"), [(0.0, 0.3), (0.9, 0.05), (0.9, 1e-4)])
def test_a_step_is_shortened_like_a_first_step_that_moves_the_weights_as_far(
    momentum: float, rate: float
) -> None:
    model = _model()
    theta = torch.zeros(1, model.rank, dtype=torch.float64)
    velocity = torch.zeros_like(theta)
    first = float(model.gradient(theta).norm())
    expected = []
    for _ in range(20):
        expected.append(float(model.loss(model.outputs(theta))))
        velocity = momentum * velocity + model.gradient(theta)
        equivalent = rate * float(velocity.norm()) / first
        theta = theta - rate * float(_TABLE.at(np.array(equivalent), _N)) * velocity
    losses = _losses(model, SGD(momentum), rate, _TABLE)
    np.testing.assert_allclose(losses[:20], expected, rtol=1e-9)
    assert losses[10] >= _losses(model, SGD(momentum), rate, None)[10]


@pytest.mark.parametrize("batch_size", [4, _N])
def test_columns_and_eigenpairs_are_slowed_alike(batch_size: int) -> None:
    columns = LinearisedModel.from_columns(
        with_columns(_spectrum(), _task(), math.inf), dtype=torch.float64
    )
    # Weight decay also moves weights in directions that no output depends on.
    for optimizer, tolerance in ((SGD(0.9), 1e-6), (SGD(0.5, weight_decay=0.1), 0.02)):
        one, other = (
            _losses(model, optimizer, 0.05, _TABLE, batch_size) for model in (_model(), columns)
        )
        np.testing.assert_allclose(one, other, rtol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 2, 3, _N])
def test_gradient_length_is_the_mean_over_all_batches(batch_size: int) -> None:
    model = _model()
    squares = [
        float(model.sample_gradients[list(batch)].mean(dim=0).square().sum())
        for batch in combinations(range(_N), batch_size)
    ]
    assert model.gradient_length(batch_size) == pytest.approx(math.sqrt(np.mean(squares)))


def test_a_rate_of_zero_does_not_move() -> None:
    losses = _losses(_model(), SGD(0.9), 1e-300, _TABLE)
    np.testing.assert_allclose(losses, losses[0])


def test_directions_of_one_batch_size_are_averaged() -> None:
    one = Saturation.from_measurement(
        np.array([16, 16, 32]),
        np.array([0.1, 1.0]),
        np.array([[1.0, 0.6], [0.8, 0.4], [2.0, -3.0]]),
    )
    assert one is not None
    np.testing.assert_allclose(one.rates, [0.01, 0.1, 1.0])
    np.testing.assert_array_equal(one.batch_sizes, [16, 32])
    np.testing.assert_allclose(one.at(np.array([0.1, 1.0]), 16), [0.9, 0.5])
    # What moves further is not taken to train faster, and nothing is taken to move backwards.
    np.testing.assert_allclose(one.at(np.array([0.1, 1.0]), 32), [1.0, 0.02])
    # The logarithm is proportional to a small rate.
    assert float(one.at(np.array(0.01), 16)) == pytest.approx(0.9**0.1)


def test_steps_of_sgd_saturate_like_longer_first_steps() -> None:
    arguments = np.array([16]), np.array([0.1, 1.0]), np.array([[0.9, 0.5]])
    plain, longer = (Saturation.from_measurement(*arguments, of_sgd=s) for s in (False, True))
    assert plain is not None and longer is not None
    rates = np.array([0.02, 0.3])
    np.testing.assert_allclose(longer.at(rates, 16), plain.at(2.0 * rates, 16))


@pytest.mark.parametrize(
    ("batch_sizes", "ratios"),
    [([16], [[1.0 + 1e-9, 1.0 - 1e-9]]), ([16], [[1.2, 3.0]]), ([], np.zeros((0, 2)))],
    ids=["linear", "growing", "not measured"],
)
def test_without_saturation_there_is_none(
    batch_sizes: list[int], ratios: list[list[float]]
) -> None:
    measured = np.array(batch_sizes, dtype=np.int64), np.array([0.1, 1.0]), np.array(ratios)
    assert Saturation.from_measurement(*measured) is None
