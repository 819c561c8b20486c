"""Simulated training on a sample of the Jacobian's columns."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp import AdamW
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import ParameterGroup
from optuna_ttp import SGD
from optuna_ttp import Spectrum
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import Saturation
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Trajectories
from tests.columns import with_columns
from tests.models import mlp
from tests.models import separated


@cache
def _task() -> FineTuningTask:
    x, y = separated(24)
    return FineTuningTask(mlp().double(), (x.double(), y))


@cache
def _spectrum() -> Spectrum:
    return compute_spectrum(
        _task(), engine="exact", dtype="float64", measure_speed=False, device="cpu"
    )


def _model(n_columns: float = np.inf, seed: int = 0) -> LinearisedModel:
    spectrum = with_columns(_spectrum(), _task(), n_columns, seed)
    return LinearisedModel.from_columns(spectrum, dtype=torch.float64)


def _curves(
    model: LinearisedModel,
    optimizer: Optimizer,
    rate: float | list[float],
    n_steps: int,
    batch_size: int = 8,
    growth: KernelGrowth | None = None,
    saturation: Saturation | None = None,
) -> Trajectories:
    configurations = optimizer.configurations(rate, optimizer.default_momentum or 0.0)
    return simulate(
        model,
        configurations,
        np.full(len(configurations), batch_size),
        max_steps=np.full(len(configurations), n_steps),
        exact=True,
        growth=growth,
        saturation=saturation,
    )


def _losses(*arguments: object, **settings: object) -> NDArray[np.float64]:
    curves = _curves(*arguments, **settings)  # type: ignore[arg-type]
    return np.asarray(curves.curves["loss"][0])


def test_plain_sgd_on_all_columns_is_that_on_the_eigenpairs() -> None:
    eigen = LinearisedModel.from_spectrum(with_columns(_spectrum(), _task()), dtype=torch.float64)
    for optimizer in (SGD(0.9), SGD(0.5, weight_decay=0.1), SGD(max_grad_norm=0.2)):
        on_columns = _losses(_model(), optimizer, 0.05, 40)
        np.testing.assert_allclose(_losses(eigen, optimizer, 0.05, 40), on_columns, rtol=1e-8)


@pytest.mark.parametrize("optimizer", [SGD(), AdamW(weight_decay=0.0)], ids=["sgd", "adamw"])
def test_the_outputs_after_a_step_are_unbiased(optimizer: Optimizer) -> None:
    def outputs(model: LinearisedModel) -> NDArray[np.float64]:
        gradient = model.gradient(model.features.new_zeros((1, model.rank)))
        assert model.weights is not None
        step = model.weights.without_rest(gradient) / model.weights.inflation
        if isinstance(optimizer, AdamW):
            step = step.sign()
        return np.asarray(model.outputs(-0.01 * step)[0].numpy())

    exact = outputs(_model())
    drawn = np.array([outputs(_model(40, seed)) for seed in range(400)])
    error = drawn.std(axis=0) / 20.0
    assert error.max() > 0.0
    assert (np.abs(drawn.mean(axis=0) - exact) < 4.5 * error + 1e-12).all()


def test_the_norm_of_the_gradient_is_unbiased_and_exact_with_all_columns() -> None:
    def square(model: LinearisedModel) -> float:
        gradient = model.gradient(model.features.new_zeros((1, model.rank)))
        assert model.weights is not None
        model.weights.without_rest(gradient)
        return float(model.gradient_norms(gradient).square())

    eigen = LinearisedModel.from_spectrum(_spectrum(), dtype=torch.float64)
    exact = float(eigen.gradient(torch.zeros(1, eigen.rank).double()).square().sum())
    assert square(_model()) == pytest.approx(exact, rel=1e-9)
    drawn = np.array([square(_model(40, seed)) for seed in range(400)])
    assert abs(drawn.mean() - exact) < 4.0 * drawn.std() / 20.0


@pytest.mark.parametrize("optimizer", [SGD(0.9), AdamW()], ids=["sgd", "adamw"])
def test_curves_converge_with_the_number_of_columns(optimizer: Optimizer) -> None:
    rate = 0.005 if isinstance(optimizer, AdamW) else 0.05
    exact = np.log(_losses(_model(), optimizer, rate, 60))
    errors = [
        np.mean(
            [
                np.abs(np.log(_losses(_model(d, seed), optimizer, rate, 60)) - exact).mean()
                for seed in range(12)
            ]
        )
        for d in (20, 50, 120)
    ]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=1.0), SGD(weight_decay=0.2)])
def test_the_decay_of_weights_that_were_not_picked_counts_in_full(optimizer: Optimizer) -> None:
    """With next to no gradient the weights shrink, and J w_0 with them, whatever was picked."""
    # Targets that are reached at the start, so that decay moves the weights first.
    model = _model(30)
    model = replace(model, soft_targets=model.initial_outputs.softmax(dim=1))
    if isinstance(optimizer, AdamW):
        optimizer = AdamW(weight_decay=1.0, eps=1e6)
    curves = _curves(model, optimizer, 0.01, 10, batch_size=24)
    shrunk = 0.99**10 if isinstance(optimizer, AdamW) else 0.998**10
    contribution = torch.as_tensor(with_columns(_spectrum(), _task()).weight_outputs)
    outputs = model.initial_outputs + (shrunk - 1.0) * contribution
    expected = float(model.loss(outputs[None]))
    tolerance = 1e-9 if isinstance(optimizer, AdamW) else 2e-3
    assert curves.curves["loss"][0, -1] == pytest.approx(expected, rel=tolerance)


def test_a_group_that_is_not_trained_stays() -> None:
    names = [n for n, _ in mlp().named_parameters()]
    head = ParameterGroup(tuple(names[2:]))
    body = ParameterGroup(tuple(names[:2]), rate=0.0)
    model = _model()
    assert model.weights is not None
    for optimizer in (AdamW(groups=(body, head)), SGD(groups=(body, head))):
        for parameter, frozen in ((0, True), (2, False)):
            features = model.features.clone()
            features[:, :, model.weights.parameters == parameter] = 0.0
            without = _losses(replace(model, features=features), optimizer, 0.01, 20)
            equal = np.allclose(without, _losses(model, optimizer, 0.01, 20), rtol=1e-9)
            assert equal == frozen


def test_under_adam_a_kernel_four_times_as_large_is_twice_as_fast() -> None:
    optimizer = AdamW(weight_decay=0.0, eps=1e-30)
    four = KernelGrowth(np.ones(1), np.full(1, 4.0))
    grown = _losses(_model(), optimizer, 0.002, 30, growth=four)
    np.testing.assert_allclose(grown, _losses(_model(), optimizer, 0.004, 30), rtol=1e-9)


def test_saturation_multiplies_the_steps_of_adam_by_the_ratio_at_their_rate() -> None:
    optimizer = AdamW(weight_decay=0.0)
    ratio = Saturation(np.array([0.01, 0.04]), np.array([1.0, 0.25]))
    slowed = _curves(_model(), optimizer, [0.01, 0.02, 0.04], 20, saturation=ratio)
    plain = _curves(_model(), optimizer, [0.01, 0.01, 0.01], 20)
    np.testing.assert_allclose(slowed.curves["loss"], plain.curves["loss"], rtol=1e-9)


def test_saturation_is_interpolated_in_rate_and_batch_size() -> None:
    ratio = Saturation(
        np.array([0.01, 1.0]), np.array([[1.0, 0.25], [1.0, 1.0]]), np.array([4.0, 16.0])
    )
    rates, sizes = np.array([0.1, 0.1, 0.1, 100.0, 1e-9]), np.array([4, 16, 8, 1, 4])
    expected = [0.5, 1.0, 0.5**0.5, 0.25, 1.0]
    np.testing.assert_allclose(ratio.at(rates, sizes), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [[0.5, 0.5]]), r"ratios must have shape \(1, 1\)"),
        (([1.0, 2.0], [0.5, 0.0]), "ratios must be positive"),
        (([2.0, 1.0], [0.5, 0.5]), "rates must be positive and ascending"),
        (([1.0, 2.0], [[0.5, 0.5]], [0.0]), "batch_sizes must be positive"),
    ],
    ids=str,
)
def test_saturation_refuses_tables_that_do_not_fit(
    arguments: tuple[list[float], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Saturation(*map(np.array, arguments))


def test_a_spectrum_without_columns_is_refused() -> None:
    with pytest.raises(ValueError, match='Compute it again with engine="columns"'):
        LinearisedModel.from_columns(_spectrum())
