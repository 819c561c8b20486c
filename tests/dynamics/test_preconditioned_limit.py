"""The scale of Adam's learning rates, against its closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from optuna_ttp import Adam
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import natural_rate
from optuna_ttp.dynamics import PreconditionedLimit
from optuna_ttp.dynamics import simulate
from tests.cases import linear_task
from tests.cases import spectrum
from tests.columns import with_columns


def _model(n_columns: float = np.inf, seed: int = 0) -> LinearisedModel:
    one = with_columns(spectrum("mse"), linear_task("mse"), n_columns, seed)
    return LinearisedModel.from_columns(one, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 12])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_limit_is_that_of_the_preconditioned_hessian(batch_size: int, momentum: float) -> None:
    model = _model()
    jacobian = model.features[:, :, :-1].reshape(36, -1)
    hessian = 2.0 / 36.0 * jacobian.T @ jacobian
    gradients = model.sample_gradients[:, :-1]
    second = gradients.square().mean(dim=0) if batch_size == 1 else gradients.mean(dim=0).square()
    preconditioner = second.sqrt() + 1e-8
    largest = float(torch.linalg.eigvals(hessian / preconditioner[:, None]).real.max())
    expected = (2.0 + 2.0 * momentum) / (1.0 - momentum) / largest
    limit = PreconditionedLimit.of(model, 1e-8)
    actual = limit.max_learning_rate(np.array([batch_size]), np.array([momentum]))
    assert actual[0] == pytest.approx(expected, rel=0.02)


def test_beyond_the_limit_a_frozen_preconditioner_diverges() -> None:
    """With a large epsilon the preconditioner is a constant."""
    model = _model()
    limit = PreconditionedLimit.of(model, 1e3)
    largest = limit.max_learning_rate(np.array([12]), np.zeros(1))[0]
    rates = largest * np.array([0.9, 1.1])
    curves = simulate(
        replace(model, soft_targets=model.initial_outputs + 1e-3),
        Adam(eps=1e3).configurations(rates, 0.0),
        np.array([12, 12]),
        max_steps=np.array([400, 400]),
    )
    stable, unstable = (c[np.isfinite(c)] for c in curves.curves["loss"])
    assert stable[-1] < 0.1 * stable[0]
    assert unstable[-1] > 10.0 * unstable[0]


def test_more_noise_allows_larger_learning_rates() -> None:
    limit = PreconditionedLimit.of(_model(), 1e-8)
    sizes = np.array([1, 2, 4, 8, 12])
    assert (np.diff(limit.max_learning_rate(sizes, np.zeros(5))) < 0.0).all()


def test_a_loss_without_curvature_has_no_limit() -> None:
    model = _model()
    flat = replace(model, features=0.0 * model.features)
    limit = PreconditionedLimit.of(flat, 1e-8)
    assert np.isinf(limit.max_learning_rate(np.array([4]), np.array([0.9]))).all()


def test_the_natural_rate_would_use_up_the_loss_in_a_step_at_the_first_speed() -> None:
    model = _model()
    rate = natural_rate(model)
    loss = float(model.loss(model.initial_outputs[None]))
    tiny = simulate(
        model,
        Adam(eps=1e-30).configurations(1e-6 * rate, 0.9),
        np.array([12]),
        max_steps=np.array([1]),
    )
    fall = loss - tiny.curves["loss"][0, 1]
    assert fall == pytest.approx(1e-6 * loss, rel=1e-3)


def test_the_limit_hardly_depends_on_which_columns_were_picked() -> None:
    def largest(n_columns: float, seed: int) -> float:
        limit = PreconditionedLimit.of(_model(n_columns, seed), 1e-8)
        return float(limit.max_learning_rate(np.array([4]), np.array([0.9]))[0])

    drawn = [largest(14, seed) for seed in range(40)]
    assert np.median(drawn) == pytest.approx(largest(np.inf, 0), rel=0.25)
