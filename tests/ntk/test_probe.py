from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
import math
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.calibration import displacement
from optuna_ttp.calibration import is_reliable
from optuna_ttp.calibration import linearisation_sd
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import probe_linearisation
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Probe
from optuna_ttp.spectrum import Spectrum
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
from tests.predictors import predictor_with


_DEPTHS = [0.85, 0.7, 0.35, 0.15, 0.05]


def _spectrum(task: FineTuningTask, **settings: Any) -> Spectrum:
    return compute_spectrum(task, dtype="float64", measure_speed=False, device="cpu", **settings)


def _probe(one: Spectrum) -> Probe:
    assert one.probe is not None
    return one.probe


def _quiet(one: Spectrum, **arguments: Any) -> TrainingTimePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliablePredictionWarning)
        return predictor_with(one, **arguments)


# Against brute force


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
    one = _spectrum(task, rank=rank)
    probe = _probe(one)
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
    assert len(probe.fractions) > 2
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
    one = _spectrum(linear_task("mse", n_samples=6))
    _, fractions = _path(LinearisedModel.from_spectrum(one, dtype=torch.float64), 5_000)
    first = {fractions[np.argmax(fractions <= f)] for f in _DEPTHS if fractions[-1] <= f}
    assert len(first) > 3
    expected = [1.0, *sorted(first, reverse=True)]
    np.testing.assert_allclose(_probe(one).fractions, expected, rtol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_depth_counts_from_the_lowest_possible_loss(smoothing: float) -> None:
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    x = torch.eye(6, dtype=torch.float64)[:3]
    one = _spectrum(FineTuningTask(mlp().double(), (x, torch.arange(3)), loss))
    model = LinearisedModel.from_spectrum(one, dtype=torch.float64)
    floor = model.loss_floor / float(model.loss(model.initial_outputs[None]))
    depths = (_probe(one).fractions - floor) / (1.0 - floor)
    assert len(depths) == len(_DEPTHS) + 1
    assert (depths[1:] <= np.array(_DEPTHS) + 1e-9).all()
    assert (depths[1:-1] > np.array(_DEPTHS)[1:]).all()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_probe_does_not_depend_on_how_many_samples_go_together(batch_size: int) -> None:
    task = FineTuningTask(cnn(), images())
    plain = _spectrum(task)
    again = _probe(
        probe_linearisation(
            task,
            replace(plain, probe=None),
            device=torch.device("cpu"),
            dtype=torch.float64,
            batch_size=batch_size,
        )
    )
    for name, values in vars(_probe(plain)).items():
        np.testing.assert_allclose(getattr(again, name), values, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_probe_of_every_architecture_leaves_the_model_alone(name: str) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    plain = _spectrum(task, probe=False)
    before = copy.deepcopy(task.model.state_dict())
    modes = [m.training for m in task.model.modules()]
    state = torch.get_rng_state()
    probe = _probe(
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
    one = _spectrum(FineTuningTask(network, vectors(8)))
    displacements = _probe(one).relative_displacements
    assert displacements[0] == 0.0
    assert np.isinf(displacements[1:]).all()
    with pytest.warns(UnreliablePredictionWarning):
        predictor = TrainingTimePredictor(one, target_fraction=0.9)
    prediction = predictor.predict(0.1, 8)
    frozen = _quiet(one, target_fraction=0.9, kernel_growth="frozen").predict(0.1, 8)
    assert prediction.outcome == "converges"
    assert prediction.steps == frozen.steps
    assert 0 <= prediction.steps_low < prediction.steps < prediction.steps_high < math.inf


def test_weights_that_do_not_move_are_not_looked_at() -> None:
    """Frozen ones, and a matrix of zeros behind which nothing is learned."""
    network = mlp()
    network.get_parameter("0.weight").requires_grad_(False).zero_()
    probe = _probe(_spectrum(FineTuningTask(network, vectors(8))))
    assert np.isfinite(probe.relative_displacements).all()


# A kernel that grows


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
    predictor = _quiet(_spectrum(task), target_fraction=0.5, exact=True)
    assert predictor.reliable
    prediction = predictor.predict(0.02, 12, settings.get("momentum", 0.0))
    assert prediction.steps.item() == pytest.approx(len(losses) - 1, abs=1)


def test_kernel_of_a_head_alone_is_not_predicted_to_grow() -> None:
    network = mlp()
    network.get_submodule("0").requires_grad_(False)
    one = _spectrum(FineTuningTask(network, separated(24)))
    frozen = _quiet(one, target_fraction=0.3, kernel_growth="frozen").predict(0.1, 24)
    prediction = _quiet(one, target_fraction=0.3).predict(0.1, 24)
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


def test_predictor_takes_growth_from_the_probe_or_from_the_user() -> None:
    one = _made_up([0.0, 0.4, 0.8])
    probe = _probe(one)
    growth = KernelGrowth.from_probe(
        probe.fractions, probe.relative_displacements, probe.kernel_ratios
    )
    configuration = ([0.05, 0.02], [12, 5], 0.5)
    arguments: list[dict[str, Any]] = [
        {},
        {"kernel_growth": "predicted"},
        {"kernel_growth": growth},
        {"kernel_growth": "frozen"},
    ]
    default, predicted, given, frozen = (
        _quiet(one, target_fraction=0.5, **a).predict(*configuration) for a in arguments
    )
    np.testing.assert_array_equal(default.steps, predicted.steps)
    np.testing.assert_array_equal(default.curve_losses, given.curve_losses)
    unprobed = TrainingTimePredictor(replace(one, probe=None), target_fraction=0.5)
    np.testing.assert_array_equal(frozen.steps, unprobed.predict(*configuration).steps)
    # A kernel that grows is quicker.
    assert (default.steps < 0.95 * frozen.steps).all()


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_papers_equation_knows_no_growth(method: Any) -> None:
    growth = KernelGrowth(np.array([1.0, 0.5]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r'kernel_growth belongs? to method="linear"'):
        TrainingTimePredictor(
            spectrum(),
            target_fraction=0.6,
            settings=PredictorSettings(method=method, kernel_growth=growth),
        )
    grown, frozen = (
        _quiet(one, target_fraction=0.6, method=method).predict(0.05, 12)
        for one in (_made_up([0.0, 0.4, 0.8]), replace(spectrum(), probe=None))
    )
    assert grown.steps == frozen.steps


@pytest.mark.parametrize("growth", ["faster", None, 2.0], ids=str)
def test_bad_growth_is_refused(growth: Any) -> None:
    with pytest.raises(ValueError, match="kernel_growth must be one of predicted, frozen but"):
        TrainingTimePredictor(
            spectrum(), target_fraction=0.6, settings=PredictorSettings(kernel_growth=growth)
        )


# Without a probe


def test_probe_can_be_turned_off() -> None:
    without = _spectrum(linear_task(), probe=False)
    assert without.probe is None
    np.testing.assert_array_equal(without.eigenvalues, spectrum().eigenvalues)
    assert without.weight_outputs is not None
    prediction = TrainingTimePredictor(without, target_fraction=0.6).predict(0.05, 12)
    assert prediction.reliable
    near = _quiet(_made_up([0.0, 0.01]), target_fraction=0.6).predict(0.05, 12)
    assert prediction.steps == pytest.approx(near.steps, abs=1)
    assert prediction.steps_high > near.steps_high


# In a file


@cache
def _whole() -> Spectrum:
    """A spectrum with all there is."""
    x, y = vectors(9)
    return _spectrum(FineTuningTask(mlp(), (x, y), validation_data=(x[:4] + 0.1, y[:4])))


def test_bytes_keep_probe_validation_and_weight_outputs() -> None:
    one = _whole()
    again = Spectrum.from_bytes(one.to_bytes())
    for part in ("probe", "validation"):
        before, after = getattr(one, part), getattr(again, part)
        assert vars(before).keys() == vars(after).keys()
        for name, values in vars(before).items():
            assert getattr(after, name).dtype == values.dtype
            np.testing.assert_array_equal(getattr(after, name), values)
    assert one.weight_outputs is not None
    assert again.weight_outputs is not None
    np.testing.assert_array_equal(again.weight_outputs, one.weight_outputs)
    assert again.to_bytes() == one.to_bytes()


@pytest.mark.parametrize("missing", ["probe", "validation", "weight_outputs"])
def test_bytes_without_a_part(missing: str) -> None:
    changed: dict[str, Any] = {missing: None}
    again = Spectrum.from_bytes(replace(_whole(), **changed).to_bytes())
    for name in ("probe", "validation", "weight_outputs"):
        assert (getattr(again, name) is None) == (name == missing)


def test_a_spectrum_without_its_optional_parts_predicts_what_it_can() -> None:
    one = replace(_whole(), weight_outputs=None, validation=None, probe=None)
    predictor = TrainingTimePredictor(one, target_fraction=0.6)
    assert predictor.spectrum.probe is None
    assert predictor.predict(0.05, 9).outcome == "converges"
    with pytest.raises(ValueError, match=r"computed by an older version. Compute it again"):
        TrainingTimePredictor(one, target_fraction=0.6, optimizer=SGD(weight_decay=0.1))
    with pytest.raises(ValueError, match="needs validation data"):
        TrainingTimePredictor(one, target_validation_accuracy=0.9)


@pytest.mark.parametrize("missing", ["probe.fractions", "validation.targets", "eigenvalues"])
def test_bytes_without_an_array_are_refused(missing: str) -> None:
    content = blob.from_bytes(_whole().to_bytes())
    arrays = {name: array for name, array in content.arrays.items() if name != missing}
    with pytest.raises(ValueError, match="These bytes are no spectrum"):
        Spectrum.from_bytes(blob.to_bytes(content.meta, arrays))


def test_truncation_keeps_probe_and_weight_outputs() -> None:
    cut = _whole().truncate(rank=4)
    assert cut.probe is _whole().probe
    assert cut.weight_outputs is _whole().weight_outputs


# Warnings


def _made_up(
    displacements: list[float],
    fractions: list[float] | None = None,
    one: Spectrum | None = None,
    ratios: list[float] | None = None,
    deviations: list[float] | None = None,
) -> Spectrum:
    """A spectrum whose weights have to go so far to some depths."""
    depths = np.array(fractions or [1.0, 0.8, 0.6, 0.4, 0.2][: len(displacements)])
    far = np.array(displacements)
    kernel = (1 + far**2) ** 2 if ratios is None else np.array(ratios)
    away = np.zeros(len(far)) if deviations is None else np.array(deviations)
    return replace(one or spectrum(), probe=Probe(depths, far, away, kernel))


@pytest.mark.parametrize(
    ("displacements", "target_fraction", "warned"),
    [
        ([0.0, 0.05, 0.1], 0.6, False),
        ([0.0, 0.05, 3.0], 0.6, True),
        ([0.0, 0.05, 3.0], 0.8, False),
        ([0.0, 0.0, 0.0, 5.0], 0.6, False),
        ([0.0, 0.0, 0.0, 5.0], 0.5, True),
        # Beyond the deepest point.
        ([0.0, 0.1], 0.3, False),
        ([0.0, 3.0], 0.3, True),
        ([0.0, math.inf, math.inf], 0.9, True),
    ],
    ids=str,
)
def test_warning_where_the_weights_have_to_go_far(
    displacements: list[float], target_fraction: float, warned: bool
) -> None:
    one = _made_up(displacements)
    arguments: dict[str, Any] = {"target_fraction": target_fraction}
    if warned:
        with pytest.warns(UnreliablePredictionWarning, match=f"^At {target_fraction:.0%} of the"):
            predictor = predictor_with(one, **arguments)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predictor = predictor_with(one, **arguments)
    assert predictor.reliable != warned
    prediction = predictor.predict([0.05, 0.1], 12)
    assert prediction.reliable.tolist() == [not warned] * 2
    single = predictor.predict(0.1, 12)
    assert single.outcome == "converges"
    assert str(single).endswith("steps; unreliable") == warned


def test_warning_tells_depth_and_displacement() -> None:
    with pytest.warns(UnreliablePredictionWarning, match=r"At 40% of .* changes by 2\.9 times"):
        TrainingTimePredictor(_made_up([0.0, 0.1, 0.2, 2.9]), target_fraction=0.4)


@pytest.mark.parametrize("quantity", ["target_loss", "target_accuracy", "smoothed"])
@pytest.mark.parametrize("far", [0.0, 3.0])
def test_every_target_has_a_depth(quantity: str, far: float) -> None:
    arguments: dict[str, Any] = {quantity: 0.7}
    if quantity == "smoothed":
        arguments = {"target_loss": 0.7, "smoothing": Smoothing.exponential(0.9)}
    one = _made_up([0.0, far], [1.0, 0.95])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predictor = predictor_with(one, **arguments)
    assert len(caught) == (far > 1.0)
    assert 0.3 < predictor.depth < 0.95
    if quantity != "target_accuracy":
        assert predictor.depth == pytest.approx(0.7 / predictor.initial_loss, rel=1e-6)


@pytest.mark.parametrize("far", [0.1, 9.0, math.inf])
def test_depth_of_an_epsilon_is_not_known(far: float) -> None:
    predictor = _quiet(
        _made_up([0.0, far]), target_epsilon=0.1, kernel_growth="frozen", max_steps=200
    )
    assert math.isnan(predictor.depth)
    unprobed = TrainingTimePredictor(
        replace(spectrum(), probe=None), target_epsilon=0.1, max_steps=200
    )
    actual, expected = (p.predict(0.05, 12) for p in (predictor, unprobed))
    for name in ("steps", "steps_low", "steps_high", "reliable"):
        assert getattr(actual, name) == getattr(expected, name), name


def test_depth_means_the_same_to_the_probe_and_to_the_target_with_label_smoothing() -> None:
    """A target at the loss of the third point is as far as the third point, and no further."""
    one = _spectrum(linear_task(torch.nn.CrossEntropyLoss(label_smoothing=0.3)))
    fractions = _probe(one).fractions
    assert len(fractions) >= 4
    far = np.array([0.0, 0.1, 0.2, *[4.0] * (len(fractions) - 3)])
    changed = replace(one, probe=Probe(fractions, far, 0 * far, (1 + far**2) ** 2))
    predictor = _quiet(changed, target_fraction=float(fractions[2]))
    assert predictor.reliable


def test_displacement_is_interpolated_in_the_logarithm_of_the_depth() -> None:
    probe = _probe(_made_up([0.0, 0.2, 0.1, 2.0]))
    for fraction, expected in ((1.0, 0.0), (2.0, 0.0), (0.8, 0.2), (0.6, 0.1), (0.4, 2.0)):
        assert displacement(probe, fraction) == pytest.approx(expected, abs=1e-12)
    assert displacement(probe, 0.01) == displacement(probe, 0.0) == 2.0
    halfway = math.exp(0.5 * (math.log(0.6) + math.log(0.4)))
    assert displacement(probe, halfway) == pytest.approx(1.05)
    assert math.isnan(displacement(None, 0.5))


def test_uncertainty_grows_with_what_the_predicted_growth_does_not_explain() -> None:
    kernel = (1 + 0.3**2) ** 2
    probes = [
        _probe(_made_up([0.0, 0.3], ratios=[1.0, kernel * r]))
        for r in (1.0, 1 / 1.5, 2.9, 1 / 3.1, 20.0, math.inf)
    ]
    sds = [linearisation_sd(p, 0.8) for p in probes]
    assert sds == sorted(sds)
    assert sds[0] < sds[1]
    assert sds[-1] < 3
    assert [is_reliable(p, 0.8) for p in probes] == [True] * 3 + [False] * 3
    # A tenth of the way to it.
    assert is_reliable(probes[3], 0.98)
    for bad in (0.0, math.inf, math.nan):
        assert not is_reliable(_probe(_made_up([0.0, 0.3], ratios=[1.0, bad])), 0.8)


def test_outputs_that_are_as_far_off_as_they_moved_are_marked() -> None:
    probes = [
        _probe(_made_up([0.0, 0.3], deviations=[0.0, d])) for d in (0.0, 0.3, 0.9, 1.1, math.inf)
    ]
    assert [is_reliable(p, 0.8) for p in probes] == [True] * 3 + [False] * 2


def test_warning_names_the_difference_of_the_kernel() -> None:
    one = _made_up([0.0, 0.1], ratios=[1.0, 7.0 * 1.01**2])
    with pytest.warns(UnreliablePredictionWarning, match=r"predicted one by a factor of 7\."):
        predictor = TrainingTimePredictor(one, target_fraction=0.5)
    assert not predictor.reliable
    assert not predictor.predict(0.05, 12).reliable


@pytest.mark.parametrize("multipliers", [None, {"0.": 5.0, "2.bias": 0.2}])
@pytest.mark.parametrize(("rank", "tolerance"), [(None, 1e-6), (9, 1e-3), (4, 1e-2)])
def test_deviations_and_kernel_ratios_are_those_of_the_displaced_network(
    multipliers: dict[str, float] | None, rank: int | None, tolerance: float
) -> None:
    x, y = separated(8)
    network = mlp().double()
    task = FineTuningTask(network, (x.double(), y), learning_rate_multipliers=multipliers)
    one = _spectrum(task, rank=rank)
    probe = _probe(one)
    model = LinearisedModel.from_spectrum(one, dtype=torch.float64)
    thetas, fractions = _path(model, 1500)
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
    assert abs(probe.kernel_ratios[3] - 1.0) > 1e-3


def test_uncertainty_grows_with_the_displacement() -> None:
    sds = [linearisation_sd(_probe(_made_up([0.0, d])), 0.5) for d in (0.0, 0.2, 1.0, 3.0, 1e9)]
    assert sds[0] > 0
    assert sds == sorted(sds)
    assert sds[-1] < 3
    assert 3 > linearisation_sd(_probe(_made_up([0.0, math.inf])), 0.5) >= sds[-1]
    assert linearisation_sd(None, 0.5) > sds[0]
    assert is_reliable(None, 0.1)


def test_task_without_loss_is_refused_by_the_predictor() -> None:
    model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    task = FineTuningTask(model, (x, model(x).detach()), loss="mse")
    one = compute_spectrum(task, measure_speed=False, dtype="float64")
    exact = replace(one, initial_outputs=one.targets.astype(np.float64), probe=None)
    probed = probe_linearisation(task, exact, device=torch.device("cpu"))
    assert probed.probe is None
    targets: list[dict[str, Any]] = [
        {"target_fraction": 0.1},
        {"target_loss": 0.1},
        {"target_epsilon": 0.1},
    ]
    for target in targets:
        with pytest.raises(ValueError, match="nothing is left to train"):
            predictor_with(probed, **target)
