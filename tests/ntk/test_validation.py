from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
import math
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.dynamics import Target
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import Validation
from optuna_ttp.task import FineTuningTask
from tests.cases import linear_task
from tests.cases import spectrum
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.predictors import predictor_with


_LOSSES = {
    "cross-entropy": torch.nn.CrossEntropyLoss(),
    "weighted and smoothed": torch.nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
    ),
    "mse": torch.nn.MSELoss(),
}


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


def _validated(loss: str = "cross-entropy") -> FineTuningTask:
    """A linear layer with held-out samples that are like the training samples."""
    plain = linear_task(_LOSSES[loss])
    x, y = plain._dataset.tensors
    generator = torch.Generator().manual_seed(9)
    more = x[:7] + 0.3 * torch.randn(7, 6, generator=generator, dtype=torch.float64)
    targets = y[:7].clone()
    targets[5:] = y[3:5]
    return FineTuningTask(plain.model, (x, y), _LOSSES[loss], validation_data=(more, targets))


def _compute(task: FineTuningTask, **settings: Any) -> Spectrum:
    return compute_spectrum(
        task, dtype="float64", measure_speed=False, device="cpu", probe=False, **settings
    )


@cache
def _spectrum(loss: str = "cross-entropy") -> Spectrum:
    return _compute(_validated(loss))


def _validation(one: Spectrum) -> Validation:
    assert one.validation is not None
    return one.validation


def _train(
    task: FineTuningTask,
    loss: torch.nn.Module,
    batch_size: int,
    n_steps: int,
    learning_rate: float,
    momentum: float,
    seed: int = 0,
    **settings: Any,
) -> dict[str, NDArray[np.float64]]:
    """Losses and accuracies before every step of a real training by torch.optim.SGD."""
    model = copy.deepcopy(task.model)
    parts = {"": task._dataset.tensors}
    if task.validation is not None:
        parts["validation_"] = task.validation._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum, **settings)
    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {}
    batches: list[torch.Tensor] = []
    x, y = parts[""]
    for _ in range(n_steps + 1):
        with torch.no_grad():
            for name, (inputs, targets) in parts.items():
                outputs = model(inputs)
                labels = targets.argmax(dim=1) if targets.ndim == 2 else targets
                share = (outputs.argmax(dim=1) == labels).double().mean()
                curves.setdefault(f"{name}loss", []).append(loss(outputs, targets).item())
                curves.setdefault(f"{name}accuracy", []).append(share.item())
        if not batches:
            batches = list(torch.randperm(len(x), generator=generator).split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch]), y[batch]))
        optimizer.step()
    return {name: np.array(values) for name, values in curves.items()}


# The curves


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize(
    ("batch_size", "momentum", "settings"),
    [(12, 0.0, {}), (5, 0.9, {}), (5, 0.8, {"nesterov": True, "weight_decay": 0.2})],
    ids=str,
)
def test_validation_curves_are_those_of_real_training_of_a_linear_model(
    batch_size: int, momentum: float, settings: dict[str, Any], loss: str
) -> None:
    real = _train(_validated(loss), _LOSSES[loss], batch_size, 60, 0.03, momentum, 3, **settings)
    curves = simulate(
        LinearisedModel.from_spectrum(_spectrum(loss), dtype=torch.float64),
        SGDConfigurations.of(0.03, momentum, **settings),
        np.array([batch_size]),
        max_steps=np.array([60]),
        full_curves=True,
        exact=True,
        seed=3,
    )
    steps = curves.steps[0].astype(int)
    assert set(curves.curves) == set(real)
    for name, values in real.items():
        np.testing.assert_allclose(curves.curves[name][0], values[steps], rtol=1e-8, err_msg=name)
    # They are no copy of the training curves.
    assert not np.allclose(real["validation_loss"], real["loss"], rtol=0.05)


def test_validation_curves_are_recorded_where_they_are_wanted() -> None:
    plain = TrainingTimePredictor(_spectrum(), target_fraction=0.6)
    assert set(plain.predict(0.05, 12).curves) == {"loss", "accuracy"}
    full = plain.predict(0.05, 12, max_steps=60, full_curve=True)
    assert set(full.curves) == {"loss", "accuracy", "validation_loss", "validation_accuracy"}
    wanted = TrainingTimePredictor(_spectrum(), target_validation_loss=0.9).predict(0.05, 12)
    assert set(wanted.curves) == set(full.curves)
    without = TrainingTimePredictor(_linear(), target_fraction=0.6)
    assert set(without.predict(0.05, 12, max_steps=60, full_curve=True).curves) == {
        "loss",
        "accuracy",
    }


def test_single_real_output_has_a_validation_loss_only() -> None:
    x, y = (
        torch.randn(8, 6, generator=torch.Generator().manual_seed(0)),
        torch.arange(8.0)[:, None],
    )
    torch.manual_seed(0)
    task = FineTuningTask(torch.nn.Linear(6, 1), (x, y), "mse", validation_data=(x + 0.1, y))
    one = _compute(task)
    predictor = TrainingTimePredictor(one, target_fraction=0.9)
    curves = predictor.predict(1e-3, 8, max_steps=20, full_curve=True).curves
    assert set(curves) == {"loss", "validation_loss"}
    with pytest.raises(ValueError, match="needs classes but the model has one real output"):
        TrainingTimePredictor(one, target_validation_accuracy=0.9)


def test_validation_changes_nothing_else() -> None:
    plain, validated = _linear(), _spectrum()
    np.testing.assert_array_equal(plain.eigenvalues, validated.eigenvalues)
    np.testing.assert_array_equal(plain.initial_outputs, validated.initial_outputs)
    steps = [
        TrainingTimePredictor(one, target_fraction=0.6).predict([0.05, 0.02], 4).steps
        for one in (plain, validated)
    ]
    np.testing.assert_array_equal(steps[0], steps[1])


# The kernel between validation and training samples


def _jacobian(model: torch.nn.Module, x: torch.Tensor) -> NDArray[np.float64]:
    exact = copy.deepcopy(model).double().eval()
    weights = {n: p.detach() for n, p in exact.named_parameters()}
    blocks = torch.func.jacrev(
        lambda w: torch.func.functional_call(exact, w, (x.double(),)).reshape(-1)
    )(weights)
    rows = torch.cat([b.reshape(len(b), -1) for b in blocks.values()], dim=1)
    return np.asarray(rows.numpy())


@pytest.mark.parametrize("max_memory", [2**30, 60_000])
def test_kernel_between_validation_and_training_samples_of_a_cnn(max_memory: int) -> None:
    model, (x, y) = cnn(), images(6)
    held_out = images(4, seed=8)
    task = FineTuningTask(model, (x, y), validation_data=held_out)
    kernel = exact_kernel(
        task, device=torch.device("cpu"), dtype=torch.float64, max_memory=max_memory
    )
    rows, others = _jacobian(model, x), _jacobian(model, held_out[0])
    assert kernel.cross is not None
    np.testing.assert_allclose(kernel.gram, rows @ rows.T, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(kernel.cross, others @ rows.T, rtol=1e-9, atol=1e-10)
    weights = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()]).numpy()
    np.testing.assert_allclose(kernel.weight_outputs.ravel(), rows @ weights, rtol=1e-9)


def test_features_are_the_kernel_in_the_coordinates_of_the_eigenpairs() -> None:
    model, (x, y) = cnn(), images(6)
    held_out = images(4, seed=8)
    one = _compute(FineTuningTask(model, (x, y), validation_data=held_out))
    validation = _validation(one)
    assert validation.features.shape == (12, one.rank)
    roots = np.sqrt(one.eigenvalues)
    expected = _jacobian(model, held_out[0]) @ _jacobian(model, x).T @ one.eigenvectors / roots
    np.testing.assert_allclose(validation.features, expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        outputs = copy.deepcopy(model).double().eval()(held_out[0].double()).numpy()
    np.testing.assert_allclose(validation.initial_outputs, outputs, rtol=1e-9)
    np.testing.assert_array_equal(validation.targets, held_out[1])


def test_training_samples_held_out_are_seen_as_in_training() -> None:
    x, y = vectors(8)
    one = _compute(FineTuningTask(mlp(), (x, y), validation_data=(x, y)))
    curves = simulate(
        LinearisedModel.from_spectrum(one, dtype=torch.float64),
        SGDConfigurations.of(0.1, 0.5),
        np.array([3]),
        max_steps=np.array([50]),
        full_curves=True,
    ).curves
    np.testing.assert_allclose(curves["validation_loss"], curves["loss"], rtol=1e-8)
    np.testing.assert_array_equal(curves["validation_accuracy"], curves["accuracy"])


def test_validation_features_know_the_multipliers() -> None:
    x, y = vectors(8)
    settings: dict[str, Any] = {"learning_rate_multipliers": {"0.": 7.0}}
    one = _compute(FineTuningTask(mlp(), (x, y), validation_data=(x[2:5], y[2:5]), **settings))
    training = (one.eigenvectors * np.sqrt(one.eigenvalues)).reshape(8, 3, -1)[2:5]
    np.testing.assert_allclose(
        _validation(one).features, training.reshape(9, -1), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_truncation_cuts_the_features(rank: int) -> None:
    whole, cut = _spectrum(), _spectrum().truncate(rank=rank)
    assert cut.rank == rank
    np.testing.assert_array_equal(_validation(cut).features, _validation(whole).features[:, :rank])
    np.testing.assert_array_equal(
        _validation(cut).initial_outputs, _validation(whole).initial_outputs
    )
    again = _compute(_validated(), rank=rank)
    np.testing.assert_allclose(
        np.abs(_validation(again).features), np.abs(_validation(cut).features)
    )
    predictor = TrainingTimePredictor(cut, target_fraction=0.98, max_steps=20)
    assert "validation_loss" in predictor.predict(0.05, 12, full_curve=True).curves


# Targets


def test_validation_loss_is_reached_when_real_training_reaches_it() -> None:
    real = _train(_validated(), _LOSSES["cross-entropy"], 12, 300, 0.05, 0.5)
    losses = real["validation_loss"]
    for share in (0.9, 0.5, 0.1):
        goal = losses.min() + share * (losses[0] - losses.min())
        predictor = TrainingTimePredictor(
            _spectrum(), target_validation_loss=goal, settings=PredictorSettings(exact=True)
        )
        expected = int(np.argmax(losses <= goal))
        assert predictor.target == Target("validation_loss", goal)
        assert predictor.predict(0.05, 12, 0.5).steps.item() == pytest.approx(expected, abs=1)
    below = TrainingTimePredictor(
        _spectrum(), target_validation_loss=0.9 * losses.min(), max_steps=300
    )
    assert below.predict(0.05, 12, 0.5).outcome == "not_reached"


def test_validation_accuracy_is_reached_when_real_training_reaches_it() -> None:
    real = _train(_validated(), _LOSSES["cross-entropy"], 12, 300, 0.05, 0.5)
    shares = real["validation_accuracy"]
    goals = [goal for goal in np.unique(shares) if goal > shares[0]]
    assert goals
    for goal in goals:
        predictor = TrainingTimePredictor(
            _spectrum(),
            target_validation_accuracy=goal,
            max_steps=300,
            settings=PredictorSettings(exact=True),
        )
        expected = int(np.argmax(shares >= goal))
        steps = predictor.predict(0.05, 12, 0.5, full_curve=True).steps.item()
        assert steps == pytest.approx(expected, abs=1, rel=0.04)
        ended = predictor.predict(0.05, 12, 0.5)
        assert ended.steps.item() == pytest.approx(expected, abs=1, rel=0.04)


@pytest.mark.parametrize("batch_size", [3, 12])
def test_validation_targets_with_strides_are_close_to_the_exact_ones(batch_size: int) -> None:
    model = LinearisedModel.from_spectrum(_spectrum())
    rate = 0.002 / float(model.curvatures[0])
    goal = 0.75 * float(model.validation.loss(model.validation.initial_outputs[None]))  # type: ignore[union-attr]
    exact, coarse = (
        TrainingTimePredictor(
            _spectrum(), target_validation_loss=goal, settings=PredictorSettings(exact=e)
        ).predict(rate, batch_size)
        for e in (True, False)
    )
    assert exact.outcome == "converges"
    assert coarse.strides.item() > 1
    assert coarse.steps.item() == pytest.approx(exact.steps.item(), rel=0.03)


def test_score_ranks_by_validation_targets() -> None:
    predictor = TrainingTimePredictor(
        _spectrum(),
        target_validation_loss=0.85,
        max_steps=1000,
        settings=PredictorSettings(n_seeds=1),
    )
    rates = [0.02, 0.05, 0.1]
    scores = predictor.score(rates, 12)
    np.testing.assert_allclose(scores, predictor.predict(rates, 12).steps, rtol=0.15)


@pytest.mark.parametrize("name", ["target_validation_loss", "target_validation_accuracy"])
def test_validation_target_without_validation_data_is_refused(name: str) -> None:
    arguments: dict[str, Any] = {name: 0.5}
    with pytest.raises(ValueError, match=f"{name} needs validation data: FineTuningTask"):
        predictor_with(_linear(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_validation_loss": 0.0}, "target_validation_loss must be positive and finite"),
        ({"target_validation_loss": math.nan}, "must be positive and finite but got nan"),
        ({"target_validation_loss": 99.0}, "must be below the initial validation loss .* 99.0"),
        ({"target_validation_accuracy": 0.0}, r"target_validation_accuracy must be in \(0, 1\]"),
        ({"target_validation_accuracy": 1.1}, r"target_validation_accuracy must be in \(0, 1\]"),
        ({"target_validation_accuracy": 0.01}, "above the initial validation accuracy"),
        (
            {"target_validation_loss": 0.5, "target_fraction": 0.5},
            "Exactly one of .* must be given but got 2",
        ),
    ],
    ids=str,
)
def test_bad_validation_targets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor_with(_spectrum(), **arguments)


# Bad validation data


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((torch.zeros(0, 6), torch.zeros(0).long()), ValueError, "validation_data: .*one sample"),
        ((torch.zeros(3, 6), torch.tensor([0, 1, 3])), ValueError, "validation_data: The labels"),
        ((torch.zeros(3, 6), torch.zeros(3)), TypeError, "validation_data: The targets"),
        ((torch.zeros(3, 6), torch.zeros(2).long()), ValueError, "validation_data: .*one row"),
        (
            (torch.full((3, 6), math.nan), torch.zeros(3).long()),
            ValueError,
            "validation_data: The inputs must be finite",
        ),
        (7, TypeError, "validation_data: data must be a map-style data set"),
    ],
    ids=["empty", "label", "float labels", "lengths", "nan", "number"],
)
def test_bad_validation_data_are_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FineTuningTask(mlp(), vectors(5), validation_data=data)


def test_validation_data_in_other_forms() -> None:
    x, y = vectors(8)
    expected = _validation(_compute(FineTuningTask(mlp(), (x, y), validation_data=(x[:3], y[:3]))))
    dataset = torch.utils.data.TensorDataset(x[:3], y[:3])
    for data in (dataset, torch.utils.data.DataLoader(dataset, batch_size=2)):
        task = FineTuningTask(mlp(), (x, y), validation_data=data)
        np.testing.assert_array_equal(_validation(_compute(task)).features, expected.features)


# Within a share of where the loss ends


def _settling(losses: NDArray[np.float64], share: float) -> int:
    """The paper's T_eps, by definition."""
    epsilon = share * abs(losses[0] - losses[-1])
    return next(t for t, loss in enumerate(losses) if abs(loss - losses[-1]) <= epsilon)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize(("batch_size", "momentum"), [(12, 0.0), (12, 0.9), (5, 0.5)])
def test_epsilon_is_reached_when_real_training_reaches_it(
    batch_size: int, momentum: float, share: float
) -> None:
    rate = 0.05 * (1.0 - momentum)
    losses = _train(linear_task(), _LOSSES["cross-entropy"], batch_size, 400, rate, momentum)[
        "loss"
    ]
    predictor = TrainingTimePredictor(
        _linear(), target_epsilon=share, max_steps=400, settings=PredictorSettings(n_seeds=1)
    )
    prediction = predictor.predict(rate, batch_size, momentum)
    assert prediction.strides.item() == 1
    # The curve is recorded every 4 %, which smooths the noise of mini-batches.
    tolerance = 0.02 if batch_size == 12 else 0.15
    assert prediction.steps.item() == pytest.approx(_settling(losses, share), rel=tolerance, abs=1)


def test_epsilon_of_the_simulated_curve() -> None:
    predictor = TrainingTimePredictor(
        _linear(), target_epsilon=0.1, max_steps=500, settings=PredictorSettings(n_seeds=1)
    )
    prediction = predictor.predict([0.05, 0.02], [12, 3], max_steps=[500, 150])
    for k, horizon in enumerate((500, 150)):
        known = np.isfinite(prediction.curve_steps[k])
        steps = prediction.curve_steps[k][known]
        assert steps[-1] == horizon
        whole = np.interp(np.arange(horizon + 1), steps, prediction.curve_losses[k][known])
        assert prediction.steps[k] == _settling(whole, 0.1)
    assert (prediction.outcomes == "converges").all()


def test_epsilon_of_a_smoothed_curve() -> None:
    smoothing = Smoothing.moving_average(8)
    predictor = TrainingTimePredictor(
        _linear(),
        target_epsilon=0.1,
        max_steps=300,
        settings=PredictorSettings(smoothing=smoothing, n_seeds=1),
    )
    assert predictor.target == Target("smoothed_loss", 0.1, settled=True)
    prediction = predictor.predict(0.05, 12)
    whole = np.interp(np.arange(301), prediction.curve_steps, prediction.curves["smoothed_loss"])
    assert prediction.steps.item() == _settling(whole, 0.1)


def test_smaller_epsilon_takes_longer_and_so_does_a_longer_horizon() -> None:
    times = [
        TrainingTimePredictor(_linear(), target_epsilon=share, max_steps=horizon)
        .predict(0.02, 12)
        .steps.item()
        for horizon in (100, 400)
        for share in (0.3, 0.1, 0.03)
    ]
    assert times[:3] == sorted(times[:3])
    assert times[3:] == sorted(times[3:])
    assert all(longer > shorter for shorter, longer in zip(times[:3], times[3:], strict=True))


@given(
    values=st.lists(st.floats(1e-3, 10), min_size=2, max_size=20),
    gaps=st.lists(st.integers(1, 9), min_size=20, max_size=20),
    share=st.floats(0.01, 0.99),
)
@settings(max_examples=60)
def test_settling_is_its_definition_on_every_curve(
    values: list[float], gaps: list[int], share: float
) -> None:
    steps = np.concatenate([[0], np.cumsum(gaps)])[: len(values)].astype(float)
    whole = np.interp(np.arange(steps[-1] + 1), steps, values)
    target = Target("loss", share, settled=True)
    padded_steps = np.concatenate([steps, [math.nan] * 3])
    padded = np.concatenate([values, [math.nan] * 3])
    assert target.first_passage(padded_steps, padded) == _settling(whole, share)
    assert not target.reached(np.array(values)).any()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan, 5.0])
def test_bad_epsilon_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"target_epsilon must be in \(0, 1\) but got"):
        TrainingTimePredictor(_linear(), target_epsilon=share)


def _tokens() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(24, 3)
    )


def test_inputs_of_another_type_or_range_are_refused() -> None:
    x, y = vectors()
    ids = (x > 0).long()
    large = ids.clone()
    # Not among the first samples, which the model is tried on.
    large[-1] = 7
    for model, good, bad, form in (
        (mlp, x, ids, r"\(6,\) a sample \(int64, from 0 to 1\)"),
        (_tokens, ids, x, r"\(6,\) a sample \(float32\)"),
        (_tokens, ids, ids + 4, r"\(6,\) a sample \(int64, from 4 to 5\)"),
    ):
        message = rf"The model cannot be run on inputs of shape {form}.*The model says: "
        with pytest.raises(ValueError, match=rf"^{message}"):
            FineTuningTask(model(), (bad, y))
        with pytest.raises(ValueError, match=rf"^validation_data: {message}"):
            FineTuningTask(model(), (good, y), validation_data=(bad, y))
    with pytest.raises(ValueError, match=r"a sample \(int64, from 0 to 7\)"):
        compute_spectrum(FineTuningTask(_tokens(), (large, y)), measure_speed=False)


def test_validation_inputs_that_the_model_cannot_take_are_refused() -> None:
    x, y = vectors()
    message = (
        r"validation_data: The model cannot be run on inputs of shape \(5,\) a sample "
        r"\(float32\); those of the training data have shape \(6,\)"
    )
    with pytest.raises(ValueError, match=message):
        FineTuningTask(mlp(), (x, y), validation_data=(x[:4, :5], y[:4]))
    # Other shapes are fine where the model takes them.
    held_out = torch.randn(4, 1, 12, 12), torch.arange(4) % 3
    task = FineTuningTask(cnn(), images(6), validation_data=held_out)
    assert task.validation is not None
    assert task.validation.n_outputs == 3
