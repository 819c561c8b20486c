"""The probe against brute force: how far the weights have to go, and how the kernel grows."""

from __future__ import annotations

import copy
from dataclasses import replace
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.ntk import probe_linearisation
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.cases import CASES
from tests.cases import linear_task
from tests.cases import spectrum
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import separated
from tests.models import vectors
from tests.probes import made_up_probe
from tests.probes import probe_of
from tests.probes import probed_spectrum
from tests.probes import quiet_predictor


_DEPTHS = [0.6, 0.25, 0.05]


def _path(model: LinearisedModel, n_steps: int) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """States of slow gradient descent, and their losses over the initial one."""
    rate = 0.5 / float(model.curvatures[0])
    states = [torch.zeros(1, model.rank, dtype=torch.float64)]
    for _ in range(n_steps):
        states.append(states[-1] - rate * model.gradient(states[-1]))
    thetas = torch.cat(states)
    losses = model.loss(model.outputs(thetas)).numpy()
    return thetas, losses / losses[0]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(
    "multipliers", [None, {"0.": 5.0, "2.bias": 0.2}], ids=["plain", "multipliers"]
)
@pytest.mark.parametrize("rank", [None, 9])
def test_displacement_is_how_far_the_linearised_path_takes_a_weight_matrix(
    loss: str, multipliers: dict[str, float] | None, rank: int | None
) -> None:
    x, y = vectors(7)
    if loss == "mse":
        y = torch.nn.functional.one_hot(y, 3) * 2.0
    network = mlp().double()
    x = x.double()
    y = y.double() if loss == "mse" else y
    task = FineTuningTask(network, (x, y), loss, learning_rate_multipliers=multipliers)
    one = probed_spectrum(task, rank=rank)
    probe = probe_of(one)
    model = LinearisedModel.from_spectrum(one, dtype=torch.float64)
    thetas, fractions = _path(model, 1500)
    weights = {n: p.detach() for n, p in network.named_parameters()}
    jacobian = {
        n: j.reshape(21, *weights[n].shape)
        for n, j in torch.func.jacrev(
            lambda w: torch.func.functional_call(network, w, (x,)).reshape(-1)
        )(weights).items()
    }
    basis = torch.as_tensor(one.eigenvectors / np.sqrt(one.eigenvalues))
    assert len(probe.fractions) >= 2
    assert (probe.fractions[0], probe.relative_displacements[0]) == (1.0, 0.0)
    for k, fraction in enumerate(probe.fractions[1:6], 1):
        t = int(np.argmin(np.abs(fractions - fraction)))
        assert fractions[t] == pytest.approx(fraction, rel=1e-9)
        u = basis @ thetas[t]
        changes = {
            n: task.multipliers[n] * torch.tensordot(u, jacobian[n], 1).norm() / w.norm()
            for n, w in weights.items()
            if w.ndim > 1
        }
        assert set(changes) == {"0.weight", "2.weight"}
        expected = max(float(c) for c in changes.values())
        assert probe.relative_displacements[k] == pytest.approx(expected, rel=1e-6)


def test_points_are_the_first_of_the_path_at_each_depth() -> None:
    one = probed_spectrum(linear_task("mse", n_samples=6))
    _, fractions = _path(LinearisedModel.from_spectrum(one, dtype=torch.float64), 5_000)
    first = {fractions[np.argmax(fractions <= f)] for f in _DEPTHS if fractions[-1] <= f}
    assert len(first) == len(_DEPTHS)
    expected = [1.0, *sorted(first, reverse=True)]
    np.testing.assert_allclose(probe_of(one).fractions, expected, rtol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_depth_counts_from_the_lowest_possible_loss(smoothing: float) -> None:
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    x = torch.eye(6, dtype=torch.float64)[:3]
    one = probed_spectrum(FineTuningTask(mlp().double(), (x, torch.arange(3)), loss))
    model = LinearisedModel.from_spectrum(one, dtype=torch.float64)
    floor = model.loss_floor / float(model.loss(model.initial_outputs[None]))
    depths = (probe_of(one).fractions - floor) / (1.0 - floor)
    assert len(depths) == len(_DEPTHS) + 1
    assert (depths[1:] <= np.array(_DEPTHS) + 1e-9).all()
    assert (depths[1:-1] > np.array(_DEPTHS)[1:]).all()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_probe_does_not_depend_on_how_many_samples_go_together(batch_size: int) -> None:
    task = FineTuningTask(cnn(), images())
    plain = probed_spectrum(task)
    again = probe_of(
        probe_linearisation(
            task,
            replace(plain, probe=None),
            device=torch.device("cpu"),
            dtype=torch.float64,
            batch_size=batch_size,
        )
    )
    for name, values in vars(probe_of(plain)).items():
        np.testing.assert_allclose(getattr(again, name), values, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_probe_of_every_architecture_leaves_the_model_alone(name: str) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    plain = probed_spectrum(task, probe=False)
    before = copy.deepcopy(task.model.state_dict())
    modes = [m.training for m in task.model.modules()]
    state = torch.get_rng_state()
    probe = probe_of(
        probe_linearisation(task, plain, device=torch.device("cpu"), dtype=torch.float64)
    )
    assert (probe.fractions[0], probe.relative_displacements[0]) == (1.0, 0.0)
    assert len(probe.fractions) == len(probe.relative_displacements) > 1
    assert (np.diff(probe.fractions) < 0).all()
    assert np.isfinite(probe.relative_displacements).all()
    assert (probe.relative_displacements[1:] > 0).all()
    after = task.model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert all(p.grad is None for p in task.model.parameters())
    assert [m.training for m in task.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_head_that_starts_at_zero_is_infinitely_displaced() -> None:
    network = mlp()
    with torch.no_grad():
        network.get_parameter("2.weight").zero_()
    one = probed_spectrum(FineTuningTask(network, vectors(8)))
    displacements = probe_of(one).relative_displacements
    assert displacements[0] == 0.0
    assert np.isinf(displacements[1:]).all()
    with pytest.warns(UnreliablePredictionWarning):
        predictor = TrainingTimePredictor(one, target_fraction=0.9)
    prediction = predictor.predict(0.1, 8)
    frozen = quiet_predictor(one, target_fraction=0.9, kernel_growth="frozen").predict(0.1, 8)
    assert prediction.outcome == "converges"
    assert prediction.steps == frozen.steps
    assert 0 <= prediction.steps_low < prediction.steps < prediction.steps_high < math.inf


def test_weights_that_do_not_move_are_not_looked_at() -> None:
    """Frozen ones, and a matrix of zeros behind which nothing is learned."""
    network = mlp()
    network.get_parameter("0.weight").requires_grad_(False).zero_()
    probe = probe_of(probed_spectrum(FineTuningTask(network, vectors(8))))
    assert np.isfinite(probe.relative_displacements).all()


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.8}], ids=str)
def test_kernel_of_a_linear_model_is_not_predicted_to_grow(settings: dict[str, Any]) -> None:
    """A model that is linear in what is trained is its linearisation, however far it has to go."""
    task = linear_task()
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), 0.02, **settings)
    losses: list[float] = []
    while not losses or losses[-1] > 0.5 * losses[0]:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    predictor = quiet_predictor(probed_spectrum(task), target_fraction=0.5, exact=True)
    assert predictor.reliable
    prediction = predictor.predict(0.02, 12, settings.get("momentum", 0.0))
    assert prediction.steps.item() == pytest.approx(len(losses) - 1, abs=1)


def test_kernel_of_a_head_alone_is_not_predicted_to_grow() -> None:
    network = mlp()
    network.get_submodule("0").requires_grad_(False)
    one = probed_spectrum(FineTuningTask(network, separated(24)))
    frozen = quiet_predictor(one, target_fraction=0.3, kernel_growth="frozen").predict(0.1, 24)
    prediction = quiet_predictor(one, target_fraction=0.3).predict(0.1, 24)
    assert prediction.steps == frozen.steps
    assert prediction.reliable


def test_growth_is_the_mean_of_what_the_displacement_and_the_displaced_kernel_say() -> None:
    fractions, displacements = np.array([1.0, 0.5, 0.2]), np.array([0.0, 0.5, 1.0])
    law = (1.0 + displacements**2) ** 2
    agreed = KernelGrowth.from_probe(fractions, displacements, law)
    np.testing.assert_allclose(agreed.at(fractions), [1.0, 1.25**2, 4.0])
    np.testing.assert_allclose(agreed.at(np.array([2.0, 0.01])), [1.0, 4.0])
    between = KernelGrowth.from_probe(fractions, displacements, np.array([1.0, 1.0, 9.0]))
    np.testing.assert_allclose(between.at(fractions), [1.0, 1.25, 6.0])
    # Beyond a factor of three it is not believed.
    apart = KernelGrowth.from_probe(fractions, displacements, np.array([1.0, 1.0, 1e6]))
    np.testing.assert_allclose(apart.at(fractions), [1.0, 1.25, 4.0 * np.sqrt(3.0)])
    unknown = KernelGrowth.from_probe(fractions, np.array([0.0, math.inf, math.inf]), law)
    np.testing.assert_array_equal(unknown.at(fractions), 1.0)
    blown_up = KernelGrowth.from_probe(fractions, displacements, np.array([1.0, 1.0, math.inf]))
    np.testing.assert_allclose(blown_up.at(fractions), [1.0, 1.25, 4.0 * np.sqrt(3.0)])


def test_probe_can_be_turned_off() -> None:
    without = probed_spectrum(linear_task(), engine="exact", probe=False)
    assert without.probe is None
    np.testing.assert_array_equal(without.eigenvalues, spectrum().eigenvalues)
    assert without.weight_outputs is not None
    prediction = TrainingTimePredictor(without, target_fraction=0.6).predict(0.05, 12)
    assert prediction.reliable
    near = quiet_predictor(made_up_probe([0.0, 0.01]), target_fraction=0.6).predict(0.05, 12)
    assert prediction.steps == pytest.approx(near.steps, abs=1)
    assert prediction.steps_high > near.steps_high


@pytest.mark.parametrize("multipliers", [None, {"0.": 5.0, "2.bias": 0.2}])
@pytest.mark.parametrize(("rank", "tolerance"), [(None, 1e-6), (9, 1e-3), (4, 1e-2)])
def test_deviations_and_kernel_ratios_are_those_of_the_displaced_network(
    multipliers: dict[str, float] | None, rank: int | None, tolerance: float
) -> None:
    x, y = separated(8)
    network = mlp().double()
    task = FineTuningTask(network, (x.double(), y), learning_rate_multipliers=multipliers)
    one = probed_spectrum(task, rank=rank)
    probe = probe_of(one)
    model = LinearisedModel.from_spectrum(one, dtype=torch.float64)
    thetas, fractions = _path(model, 5_000)
    basis = torch.as_tensor(one.eigenvectors / np.sqrt(one.eigenvalues))
    weights = {n: p.detach() for n, p in network.named_parameters()}

    def outputs(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(torch.func.functional_call(network, w, (x.double(),)))

    def pulled_back(w: dict[str, torch.Tensor], u: torch.Tensor) -> dict[str, torch.Tensor]:
        (change,) = torch.func.vjp(outputs, w)[1](u)
        return {n: task.multipliers[n] * d for n, d in change.items()}

    def squared(w: dict[str, torch.Tensor], u: torch.Tensor) -> float:
        scaled = pulled_back(w, u)
        return sum(float(d.square().sum()) / task.multipliers[n] for n, d in scaled.items())

    for k, fraction in enumerate(probe.fractions[1:4], 1):
        theta = thetas[int(np.argmin(np.abs(fractions - fraction)))]
        change = pulled_back(weights, (basis @ theta).reshape(8, -1))
        expected = model.outputs(theta[None])
        u = model.residuals(expected, model.soft_targets, model.normalisers)[0]
        there = {n: w + change[n] for n, w in weights.items()}
        ratio = squared(there, u) / squared(weights, u)
        # What is dropped is known on average, and computed where it is much.
        assert probe.kernel_ratios[k] == pytest.approx(ratio, rel=tolerance)
        away = (outputs(there) - expected[0]).norm()
        moved = (expected[0] - model.initial_outputs).norm()
        assert probe.output_deviations[k] == pytest.approx(float(away / moved), rel=1e-6)
    assert (probe.kernel_ratios[0], probe.output_deviations[0]) == (1.0, 0.0)
    assert abs(probe.kernel_ratios[-1] - 1.0) > 1e-3
