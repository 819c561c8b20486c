"""The sample of columns against the Jacobian by one backward pass an output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp import JacobianMismatchError
from optuna_ttp import Spectrum
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines import _columns
from optuna_ttp.ntk.engines._columns import pick_columns
from optuna_ttp.ntk.engines._picked_columns import PickedColumns
from optuna_ttp.ntk.layers._picked import picked_columns
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.cases import case
from tests.cases import CASES
from tests.reference import brute_force_jacobian


def _picked(
    one: Case, n_columns: int, device: torch.device, *, seed: int = 0, **arguments: Any
) -> tuple[FineTuningTask, PickedColumns]:
    task = FineTuningTask(one.model, one.data, forward=one.forward, **arguments)
    settings = EngineSettings(device, torch.float64, seed=seed, show_progress_bar=False)
    outputs = task.initial_outputs(device, torch.float64)
    return task, pick_columns(task, settings, outputs, n_columns=n_columns)


def _offsets(model: torch.nn.Module) -> np.ndarray[Any, Any]:
    """Return the first column of each trainable parameter in the whole Jacobian."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    return np.cumsum([0, *sizes])


@pytest.mark.parametrize("n_columns", [40, 1_000_000])
@pytest.mark.parametrize("name", CASES)
def test_picked_columns_are_those_of_plain_differentiation(
    name: str, n_columns: int, device: torch.device
) -> None:
    one = case(name)
    jacobian = brute_force_jacobian(one)
    _, picked = _picked(one, n_columns, device)
    where = _offsets(one.model)[picked.parameters.cpu().numpy()] + picked.positions.cpu().numpy()
    assert len(set(where.tolist())) == len(where)
    expected = jacobian[:, where]
    columns = picked.columns.cpu().numpy()
    np.testing.assert_allclose(columns, expected, atol=1e-8 * np.abs(jacobian).max())
    if n_columns > jacobian.shape[1]:
        # No column that any output depends on is left out.
        np.testing.assert_allclose(columns @ columns.T, jacobian @ jacobian.T, rtol=1e-6)
        assert bool((picked.inflation == 1.0).all())
    else:
        assert abs(len(where) - n_columns) <= 25


def test_products_of_the_sample_are_right_in_expectation(device: torch.device) -> None:
    one = case("cnn with batch norm and in-place relu")
    jacobian = brute_force_jacobian(one)
    expected = jacobian @ jacobian.T
    mean, errors = np.zeros_like(expected), []
    n_seeds = 30
    for seed in range(n_seeds):
        _, picked = _picked(one, 200, device, seed=seed)
        z = (picked.columns * picked.inflation.sqrt()).cpu().numpy()
        mean += z @ z.T / n_seeds
        errors.append(np.linalg.norm(z @ z.T - expected))
    assert len(jacobian.T) > 400
    assert 0.0 < np.mean(errors) < 0.5 * np.linalg.norm(expected)
    # The mean of independent samples comes closer by the root of their number.
    assert np.linalg.norm(mean - expected) < 2.0 * np.mean(errors) / n_seeds**0.5


def test_weight_outputs_are_the_jacobian_times_the_weights(device: torch.device) -> None:
    one = case("mlp")
    jacobian = brute_force_jacobian(one)
    factors = {"0.weight": 3.0}
    task, picked = _picked(one, 10_000, device, learning_rate_multipliers=factors)
    weights = torch.cat(
        [
            3.0 * p.flatten() if n == "0.weight" else p.flatten()
            for n, p in one.model.named_parameters()
        ]
    )
    expected = (jacobian @ weights.detach().double().numpy()).reshape(task.n_samples, -1)
    np.testing.assert_allclose(picked.weight_outputs, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", ["mlp", "cnn with batch norm and in-place relu", "multi-head attention"]
)
def test_a_spectrum_from_all_columns_is_that_of_the_exact_kernel(
    name: str, device: torch.device
) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    settings: dict[str, Any] = {"device": device, "dtype": "float64", "measure_speed": False}
    exact = compute_spectrum(task, engine="exact", **settings)
    sampled = compute_spectrum(task, engine="columns", **settings)
    np.testing.assert_allclose(sampled.trace, exact.trace, rtol=1e-8)
    n = min(exact.rank, sampled.rank)
    largest = exact.eigenvalues[0]
    np.testing.assert_allclose(
        sampled.eigenvalues[:n], exact.eigenvalues[:n], atol=1e-8 * largest, rtol=1e-6
    )
    assert sampled.metadata.engine == "columns"
    assert sampled.metadata.time_error == 0.0
    assert sampled.jacobian is not None
    assert sampled.jacobian.names == tuple(task.multipliers)
    again = Spectrum.from_bytes(sampled.to_bytes())
    assert again.jacobian is not None
    np.testing.assert_array_equal(again.jacobian.codes, sampled.jacobian.codes)


def test_multipliers_and_validation_samples_agree_with_the_exact_engine(
    device: torch.device,
) -> None:
    one = case("mlp")
    inputs, targets = one.data
    task = FineTuningTask(
        one.model,
        (inputs[3:], targets[3:]),
        validation_data=(inputs[:3], targets[:3]),
        learning_rate_multipliers={"0.weight": 4.0},
    )
    settings: dict[str, Any] = {"device": device, "dtype": "float64", "measure_speed": False}
    exact = compute_spectrum(task, engine="exact", **settings)
    sampled = compute_spectrum(task, engine="columns", **settings)
    assert exact.validation is not None
    assert sampled.validation is not None
    assert exact.decay_factors is not None
    assert sampled.decay_factors is not None
    n = 5
    np.testing.assert_allclose(sampled.eigenvalues[:n], exact.eigenvalues[:n], rtol=1e-6)
    np.testing.assert_allclose(sampled.decay_factors[:n], exact.decay_factors[:n], rtol=1e-5)
    signs = np.sign((sampled.eigenvectors * exact.eigenvectors)[:, :n].sum(axis=0))
    np.testing.assert_allclose(
        sampled.validation.features[:, :n] * signs, exact.validation.features[:, :n], atol=1e-4
    )
    assert sampled.jacobian is not None
    assert sampled.jacobian.validation_columns is not None
    assert len(sampled.jacobian.validation_columns) == 3 * task.n_outputs


def test_same_seed_same_sample_and_other_seeds_others(device: torch.device) -> None:
    one = case("cnn with batch norm and in-place relu")
    first, again, other = (_picked(one, 100, device, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first.columns, again.columns)
    assert torch.equal(first.positions, again.positions)
    assert not (
        first.positions.shape == other.positions.shape
        and torch.equal(first.positions, other.positions)
    )


def test_wrong_gradients_are_found_in_every_computation(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The choice of rules on the first samples does not use this function.
    monkeypatch.setattr(
        _columns, "picked_columns", lambda factors, picked: 1.5 * picked_columns(factors, picked)
    )
    with pytest.raises(JacobianMismatchError, match="differs most"):
        _picked(case("mlp"), 10_000, device)


def test_a_network_that_no_weight_moves_is_refused(device: torch.device) -> None:
    head = torch.nn.Linear(5, 2).requires_grad_(requires_grad=False)
    torch.nn.init.zeros_(head.weight)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), head)
    task = FineTuningTask(model, (torch.randn(6, 4), torch.arange(6) % 2))
    with pytest.raises(ValueError, match="Jacobian must not be zero"):
        compute_spectrum(task, engine="columns", device=device, measure_speed=False)
