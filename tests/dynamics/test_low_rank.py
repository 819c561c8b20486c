"""Simulated training of low-rank adapters, whose product is not linearised."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp import Adam
from optuna_ttp import AdamW
from optuna_ttp import compute_spectrum
from optuna_ttp import ParameterGroup
from optuna_ttp import Schedule
from optuna_ttp import SGD
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import PreconditionedLimit
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Trajectories
from tests.columns import rows_of
from tests.columns import train
from tests.low_rank import adapted_task


@cache
def _spectrum(**arguments: Any) -> Spectrum:
    task = adapted_task(**arguments)
    spectrum = compute_spectrum(
        task,
        engine="columns",
        dtype="float64",
        measure_speed=False,
        probe=False,
        device="cpu",
    )
    # The engine's are a difference quotient, right to the root of the rounding error.
    weights = [p.detach().flatten() for p in task.model.parameters() if p.requires_grad]
    outputs = rows_of(task.model, task._dataset.tensors[0]) @ torch.cat(weights).numpy()
    assert spectrum.weight_outputs is not None
    outputs = outputs.reshape(spectrum.weight_outputs.shape)
    np.testing.assert_allclose(spectrum.weight_outputs, outputs, atol=1e-6)
    return replace(spectrum, weight_outputs=outputs)


def _model(**arguments: Any) -> LinearisedModel:
    return LinearisedModel.from_columns(_spectrum(**arguments), dtype=torch.float64)


def _simulated(
    model: LinearisedModel,
    optimizer: Optimizer,
    rate: float | list[float],
    batch_size: int,
    n_steps: int,
    schedule: Schedule | None = None,
) -> Trajectories:
    momentum = optimizer.default_momentum or 0.0
    configurations = optimizer.configurations(rate, momentum, schedule)
    return simulate(
        model,
        configurations,
        np.full(len(configurations), batch_size),
        max_steps=np.full(len(configurations), n_steps),
        exact=True,
        full_curves=True,
        seed=3,
    )


def _check(curves: Trajectories, losses: NDArray[np.float64]) -> None:
    steps = curves.steps[0].astype(np.int64)
    np.testing.assert_allclose(curves.curves["loss"][0], losses[steps], rtol=1e-10, atol=1e-12)


_ADAPTERS: list[dict[str, Any]] = [
    {"rank": 1, "alpha": 0.5},
    {"rank": 2, "alpha": 16.0, "bias": True},
    {"rank": 3, "rank_stabilised": True},
    {"rank": 4, "alpha": 8.0, "rank_stabilised": True, "bias": True},
    {"rank": 2, "started": True},
    {"rank": 4, "alpha": 1.0, "bias": True, "started": True},
]


@given(
    kind=st.sampled_from([Adam, AdamW]),
    adapter=st.sampled_from(_ADAPTERS),
    rate=st.floats(1e-4, 0.05),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.9, 0.99, 0.999])),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    max_grad_norm=st.sampled_from([None, 0.01, 0.3]),
    batch_size=st.sampled_from([4, 5, 12]),
    accumulation_steps=st.integers(1, 2),
)
@settings(max_examples=60)
def test_training_of_an_adapter_follows_pytorch(
    kind: type[Adam],
    adapter: dict[str, Any],
    rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    max_grad_norm: float | None,
    batch_size: int,
    accumulation_steps: int,
) -> None:
    optimizer = kind(
        betas,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
    )
    real: Any = torch.optim.AdamW if kind is AdamW else torch.optim.Adam
    losses = train(
        adapted_task(**adapter),
        torch.nn.CrossEntropyLoss(),
        lambda m: real(m.parameters(), rate, betas, weight_decay=weight_decay),
        batch_size=batch_size,
        n_steps=15,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
    )
    _check(_simulated(_model(**adapter), optimizer, rate, batch_size, 15), losses)


@pytest.mark.parametrize("started", [False, True])
def test_sgd_with_a_schedule_follows_pytorch(started: bool) -> None:
    schedule = Schedule.of(lambda t: max(0.0, 1.0 - t / 20.0))
    losses = train(
        adapted_task(started=started),
        torch.nn.CrossEntropyLoss(),
        lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=0.1),
        batch_size=5,
        n_steps=20,
        scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 20),
    )
    optimizer = SGD(0.9, weight_decay=0.1)
    curves = _simulated(_model(started=started), optimizer, 0.1, 5, 20, schedule)
    _check(curves, losses)


def test_groups_may_hold_factors_of_adapters() -> None:
    names = {n: p for n, p in adapted_task().model.named_parameters() if p.requires_grad}
    second = tuple(n for n in names if "lora_B" in n)
    others = tuple(n for n in names if n not in second)

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        by_name = dict(model.named_parameters())
        return [
            {"params": [by_name[n] for n in others], "lr": 0.01},
            {"params": [by_name[n] for n in second], "lr": 0.16, "weight_decay": 0.0},
        ]

    # LoRA+ (Hayou et al., 2024, arXiv 2402.12354): a larger rate for B.
    losses = train(
        adapted_task(),
        torch.nn.CrossEntropyLoss(),
        lambda m: torch.optim.AdamW(groups(m), 0.01, weight_decay=0.1),
        batch_size=5,
        n_steps=15,
    )
    parts = ParameterGroup(others), ParameterGroup(second, 16.0, 0.0)
    optimizer = AdamW(weight_decay=0.1, groups=parts)
    _check(_simulated(_model(), optimizer, 0.01, 5, 15), losses)


def test_configurations_together_are_those_alone() -> None:
    rates = [0.01, 0.03, 0.1]
    together = _simulated(_model(), AdamW(), rates, 5, 12).curves["loss"]
    for k, rate in enumerate(rates):
        alone = _simulated(_model(), AdamW(), rate, 5, 12).curves["loss"][0]
        np.testing.assert_allclose(together[k], alone, rtol=1e-11)


def test_validation_samples_follow_the_network() -> None:
    """The validation loss is that of training on the same samples, restricted to them."""
    spectrum = _spectrum(validated=True)
    model = LinearisedModel.from_columns(spectrum, dtype=torch.float64)
    assert model.validation is not None
    theta = torch.randn(2, model.rank, generator=torch.Generator().manual_seed(0)).double()
    # Decay alone moves the last coordinate, which validation samples lack.
    theta[:, -1] = 0.0
    task = adapted_task(validated=True)
    held_out, _ = task.validation._dataset.tensors  # type: ignore[union-attr]
    assert spectrum.jacobian is not None
    named = dict(task.model.named_parameters())
    for state, outputs in zip(theta, model.validation.outputs(theta), strict=True):
        rest = state
        with torch.no_grad():
            for layer in spectrum.low_rank:
                for index, initial in zip(
                    layer.parameters, (layer.first, layer.second), strict=True
                ):
                    change, rest = rest[: initial.size], rest[initial.size :]
                    value = torch.as_tensor(initial) + change.reshape(initial.shape)
                    named[spectrum.jacobian.names[index]].copy_(value)
            bias = torch.as_tensor(spectrum.jacobian.weights)
            order = spectrum.jacobian.positions
            named["readout.bias"][order] = bias + rest[:-1]
            expected = task.model(held_out)
        np.testing.assert_allclose(outputs.numpy(), expected.numpy(), rtol=1e-10)


def test_a_restricted_model_is_that_of_its_samples() -> None:
    model = _model(started=True)
    some = torch.tensor([3, 1, 8])
    theta = torch.randn(2, model.rank, generator=torch.Generator().manual_seed(0)).double()
    part = model.restricted(some).outputs(theta)
    np.testing.assert_allclose(part.numpy(), model.outputs(theta)[:, some].numpy(), rtol=1e-10)


def test_half_precision_on_disk_changes_the_loss_by_less_than_a_thousandth() -> None:
    spectrum = _spectrum()
    halves = tuple(
        replace(
            layer,
            inputs=layer.inputs.astype(np.float16),
            cotangents=layer.cotangents.astype(np.float16),
        )
        for layer in spectrum.low_rank
    )
    half = replace(spectrum, low_rank=halves)
    coarse = LinearisedModel.from_columns(half, dtype=torch.float64)
    curves = [_simulated(m, AdamW(), 0.01, 5, 40).curves["loss"][0] for m in (_model(), coarse)]
    assert curves[0][-1] < 0.95 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_the_limit_of_stability_is_that_of_the_network_at_the_start(
    kind: str, started: bool
) -> None:
    model = replace(_model(started=started), kind=kind)
    assert model.low_rank is not None
    units = torch.eye(model.n_low_rank, dtype=torch.float64)
    tangent = model.low_rank.first_order(units).permute(1, 2, 0)
    # The same Jacobian as columns.
    features = torch.cat([tangent, model.features], dim=2)
    step = 1e-7
    quotient = (model.low_rank.output_changes(step * units) / step).permute(1, 2, 0)
    np.testing.assert_allclose(tangent.numpy(), quotient.numpy(), atol=1e-5)
    linear = replace(model, features=features, low_rank=None)
    limits = [PreconditionedLimit.of(m, 1e-3) for m in (model, linear)]
    np.testing.assert_allclose(
        limits[0].log_curvatures, limits[1].log_curvatures, rtol=0.0, atol=1e-9
    )
    gradient = model.gradient(torch.zeros(1, model.rank).double())
    np.testing.assert_allclose(model.gradient_moments[0][None], gradient, atol=1e-12)


def test_times_of_adapters_are_predicted() -> None:
    spectrum = _spectrum(n_samples=24)
    predictor = TrainingTimePredictor(spectrum, target_fraction=0.95, optimizer=AdamW())
    prediction = predictor.predict(0.01, 8)
    losses = train(
        adapted_task(n_samples=24),
        torch.nn.CrossEntropyLoss(),
        lambda m: torch.optim.AdamW(m.parameters(), 0.01),
        batch_size=8,
        n_steps=80,
    )
    real = int((losses <= 0.95 * losses[0]).argmax())
    assert real > 5
    assert prediction.steps == pytest.approx(real, rel=0.25)
