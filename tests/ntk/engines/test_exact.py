"""The exact kernel against one backward pass an output."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.cases import CASES
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


@pytest.mark.parametrize("name", CASES)
def test_gram_matrix_equals_brute_force(name: str, device: torch.device) -> None:
    one = case(name)
    jacobian = brute_force_jacobian(one)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    single = exact_kernel(task, device=device).gram
    double = exact_kernel(task, device=device, dtype=torch.float64).gram
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert relative_error(single, jacobian @ jacobian.T) < 1e-4
    assert relative_error(double, jacobian @ jacobian.T) < 1e-12
    np.testing.assert_allclose(double, double.T, rtol=0, atol=1e-14 * np.abs(double).max())


def test_many_small_gradients_do_not_drown_in_a_few_large_ones(device: torch.device) -> None:
    """In single precision throughout, millions of weights would lose several per mille."""
    x = torch.full((2, 4_000_000), 0.05)
    x[:, ::50_000] = 100.0
    x[1, 1::2] *= -1
    layer = torch.nn.Linear(x.shape[1], 1, bias=False)
    task = FineTuningTask(layer, (x, torch.zeros(2, 1)), loss="mse")
    jacobian = x.double().numpy()
    gram = exact_kernel(task, device=device).gram
    assert relative_error(gram, jacobian @ jacobian.T) < 1e-4
    budget = _smallest_budget(task, torch.float32)
    blocked = exact_kernel(task, device=device, max_memory=budget).gram
    assert relative_error(blocked, jacobian @ jacobian.T) < 1e-4


def test_frozen_parameters_do_not_count() -> None:
    one = case("frozen parameters")
    frozen = exact_kernel(FineTuningTask(one.model, one.data), device=CPU).gram
    free = exact_kernel(FineTuningTask(one.model.requires_grad_(True), one.data), device=CPU).gram
    assert np.trace(free) > 1.01 * np.trace(frozen)


def test_parameter_that_moves_no_output_changes_nothing() -> None:
    model = mlp()
    expected = exact_kernel(FineTuningTask(model, vectors(5)), device=CPU).gram
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(7)))
    np.testing.assert_allclose(
        exact_kernel(FineTuningTask(model, vectors(5)), device=CPU).gram, expected, rtol=1e-6
    )


def test_output_that_no_parameter_moves_has_zero_rows() -> None:
    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(x)[:, :2], x[:, :1]], dim=1)

    gram = exact_kernel(FineTuningTask(mlp(), vectors(4), forward=forward), device=CPU).gram
    assert (gram[2::3] == 0).all()
    assert (np.diag(gram)[:2] > 0).all()


def test_single_sample_and_single_output() -> None:
    x, _ = vectors(1)
    task = FineTuningTask(torch.nn.Linear(6, 1), (x, torch.zeros(1, 1)), loss="mse")
    gram = exact_kernel(task, device=CPU).gram
    np.testing.assert_allclose(gram, [[float((x**2).sum()) + 1.0]], rtol=1e-6)


def _smallest_budget(task: FineTuningTask, dtype: torch.dtype) -> int:
    return plan_spectrum(
        task, engine="exact", dtype=str(dtype).removeprefix("torch.")
    ).minimum_bytes


@given(
    n_samples=st.integers(1, 9),
    budget=st.floats(1.0, 8.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25)
def test_gram_matrix_does_not_depend_on_the_blocks(
    n_samples: int, budget: float, dtype: torch.dtype
) -> None:
    task = FineTuningTask(mlp(), vectors(n_samples))
    whole = exact_kernel(task, device=CPU, dtype=dtype).gram
    allowed = int(budget * _smallest_budget(task, dtype))
    blocked = exact_kernel(task, device=CPU, dtype=dtype, max_memory=allowed).gram
    precision = 1e-14 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(blocked, whole, rtol=0, atol=precision * np.abs(whole).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_too_small_memory_budget_is_refused(dtype: torch.dtype) -> None:
    task = FineTuningTask(mlp(), vectors(6))
    budget = _smallest_budget(task, dtype)
    exact_kernel(task, device=CPU, dtype=dtype, max_memory=budget)
    for too_small in (budget - 1, 1, 0, -5):
        with pytest.raises(ValueError, match=r"max_memory must be at least .* 18 outputs and 163"):
            exact_kernel(task, device=CPU, dtype=dtype, max_memory=too_small)
