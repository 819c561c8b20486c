"""Every optimiser, on a linear model with all columns, against PyTorch's, step by step."""

from __future__ import annotations

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
from optuna_ttp import optimizer_from_torch
from optuna_ttp import ParameterGroup
from optuna_ttp import Schedule
from optuna_ttp import SGD
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import simulate
from tests.cases import linear_task
from tests.cases import spectrum
from tests.columns import train
from tests.columns import with_columns
from tests.dynamics.simulations import LOSSES


def _model(loss: str, *, columns: bool = True) -> LinearisedModel:
    one = spectrum(LOSSES[loss])
    if not columns:
        return LinearisedModel.from_spectrum(one, dtype=torch.float64)
    full = with_columns(one, linear_task(LOSSES[loss]))
    return LinearisedModel.from_columns(full, dtype=torch.float64)


def _simulated(
    model: LinearisedModel,
    optimizer: Optimizer,
    rate: float,
    momentum: float,
    batch_size: int,
    n_steps: int,
    schedule: Schedule | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    curves = simulate(
        model,
        optimizer.configurations(rate, momentum, schedule),
        np.array([batch_size]),
        max_steps=np.array([n_steps]),
        exact=True,
        seed=3,
    )
    return curves.steps[0].astype(np.int64), curves.curves["loss"][0]


def _kind(name: str) -> Any:
    return {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]


# With a small beta_2 or eps Adam itself amplifies rounding errors: it divides by the gradient.
_BETAS = st.tuples(
    st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.9, 0.99, 0.999, 0.9999])
)


@given(
    kind=st.sampled_from(["Adam", "AdamW"]),
    loss=st.sampled_from(sorted(LOSSES)),
    rate=st.floats(1e-4, 0.1),
    betas=_BETAS,
    eps=st.sampled_from([1e-8, 1e-3, 1.0]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    batch_size=st.sampled_from([1, 4, 5, 12]),
    max_grad_norm=st.sampled_from([None, 0.01, 0.3]),
    accumulation_steps=st.integers(1, 3),
    bias=st.sampled_from([None, (0.1, 0.0), (3.0, 0.2), (0.0, 0.1)]),
    decreasing=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_adam_follows_torch(
    kind: str,
    loss: str,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    batch_size: int,
    max_grad_norm: float | None,
    accumulation_steps: int,
    bias: tuple[float, float] | None,
    decreasing: bool,
) -> None:
    def real(model: torch.nn.Module) -> torch.optim.Optimizer:
        groups: Any = model.parameters()
        if bias is not None:
            groups = [
                {"params": [model.weight]},
                {"params": [model.bias], "lr": bias[0] * rate, "weight_decay": bias[1]},
            ]
        optimizer: torch.optim.Optimizer = _kind(kind)(
            groups, rate, betas, eps=eps, weight_decay=weight_decay
        )
        return optimizer

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=40)

    losses = train(
        linear_task(LOSSES[loss]),
        LOSSES[loss],
        real,
        batch_size=batch_size,
        n_steps=30,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
        scheduler=scheduler if decreasing else None,
    )
    module = linear_task(LOSSES[loss]).model
    optimizer = optimizer_from_torch(
        real(module), module, max_grad_norm=max_grad_norm, accumulation_steps=accumulation_steps
    )
    assert isinstance(optimizer, AdamW if kind == "AdamW" else Adam)
    schedule = Schedule.from_torch(scheduler) if decreasing else None
    steps, simulated = _simulated(
        _model(loss), optimizer, rate, betas[0], batch_size, 30, schedule
    )
    np.testing.assert_allclose(simulated, losses[steps], rtol=1e-10, atol=1e-10)


@given(
    loss=st.sampled_from(sorted(LOSSES)),
    momentum=st.sampled_from([0.0, 0.8]),
    dampening=st.sampled_from([0.0, 0.4]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.3]),
    batch_size=st.sampled_from([1, 4, 5, 12]),
    max_grad_norm=st.sampled_from([None, 0.1, 1.0]),
    accumulation_steps=st.integers(1, 3),
    bias=st.sampled_from([None, (0.1, 0.0), (3.0, 0.2)]),
)
@settings(max_examples=60, deadline=None)
def test_sgd_follows_torch_on_columns_and_on_eigenpairs(
    loss: str,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    batch_size: int,
    max_grad_norm: float | None,
    accumulation_steps: int,
    bias: tuple[float, float] | None,
) -> None:
    nesterov = nesterov and momentum > 0 and dampening == 0
    rate = 0.02

    def real(model: torch.nn.Module) -> torch.optim.Optimizer:
        groups: Any = model.parameters()
        if bias is not None:
            groups = [
                {"params": [model.weight]},
                {"params": [model.bias], "lr": bias[0] * rate, "weight_decay": bias[1]},
            ]
        return torch.optim.SGD(
            groups,
            rate,
            momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )

    losses = train(
        linear_task(LOSSES[loss]),
        LOSSES[loss],
        real,
        batch_size=batch_size,
        n_steps=30,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
    )
    module = linear_task(LOSSES[loss]).model
    optimizer = optimizer_from_torch(
        real(module), module, max_grad_norm=max_grad_norm, accumulation_steps=accumulation_steps
    )
    assert isinstance(optimizer, SGD)
    for columns in (True,) if bias else (True, False):
        model = _model(loss, columns=columns)
        steps, simulated = _simulated(model, optimizer, rate, momentum, batch_size, 30)
        np.testing.assert_allclose(simulated, losses[steps], rtol=1e-10, atol=1e-10)


def test_configurations_simulated_together_equal_each_alone() -> None:
    model = _model("cross-entropy")
    optimizer = AdamW(max_grad_norm=0.5, weight_decay=0.1)
    rates, momenta = np.array([0.001, 0.1, 0.03]), np.array([0.9, 0.0, 0.95])
    steps = np.array([40, 7, 25])
    together = simulate(
        model, optimizer.configurations(rates, momenta), np.full(3, 5), max_steps=steps
    )
    for k in range(3):
        alone = simulate(
            model,
            optimizer.configurations(rates[k], momenta[k]),
            np.array([5]),
            max_steps=steps[k : k + 1],
        )
        n = alone.curves["loss"].shape[1]
        np.testing.assert_allclose(
            together.curves["loss"][k, :n], alone.curves["loss"][0], rtol=1e-12
        )


def test_one_cycle_changes_beta_1_as_in_torch() -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)

    losses = train(
        linear_task(LOSSES["mse"]),
        LOSSES["mse"],
        lambda model: torch.optim.AdamW(model.parameters(), 0.1),
        batch_size=5,
        n_steps=30,
        scheduler=scheduler,
    )
    schedule = Schedule.one_cycle(40)
    steps, simulated = _simulated(_model("mse"), AdamW(), 0.1, 0.9, 5, 30, schedule)
    np.testing.assert_allclose(simulated, losses[steps], rtol=1e-10)


_BOTH = ParameterGroup(("weight", "bias"), rate=2.0)


@pytest.mark.parametrize("optimizer", [Adam(), SGD(groups=(_BOTH,))], ids=["adam", "groups"])
def test_eigen_directions_are_refused_where_single_weights_count(optimizer: Any) -> None:
    model = _model("mse", columns=False)
    with pytest.raises(ValueError, match="need a model of columns"):
        _simulated(model, optimizer, 0.1, 0.9, 5, 3)
