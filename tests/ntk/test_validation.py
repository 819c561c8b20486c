"""The kernel between validation and training samples, and bad validation data."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.task import FineTuningTask
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.validated import linear_spectrum
from tests.validated import spectrum_of
from tests.validated import validated_spectrum
from tests.validated import validated_task
from tests.validated import validation_of


def test_validation_changes_nothing_else() -> None:
    plain = linear_spectrum()
    validated = validated_spectrum(validated_task(), engine="exact")
    np.testing.assert_array_equal(plain.eigenvalues, validated.eigenvalues)
    np.testing.assert_array_equal(plain.initial_outputs, validated.initial_outputs)
    steps = [
        TrainingTimePredictor(one, target_fraction=0.6).predict([0.05, 0.02], 4).steps
        for one in (plain, validated)
    ]
    np.testing.assert_array_equal(steps[0], steps[1])


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
    one = validated_spectrum(FineTuningTask(model, (x, y), validation_data=held_out))
    validation = validation_of(one)
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
    one = validated_spectrum(FineTuningTask(mlp(), (x, y), validation_data=(x, y)))
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
    one = validated_spectrum(
        FineTuningTask(mlp(), (x, y), validation_data=(x[2:5], y[2:5]), **settings)
    )
    training = (one.eigenvectors * np.sqrt(one.eigenvalues)).reshape(8, 3, -1)[2:5]
    np.testing.assert_allclose(
        validation_of(one).features, training.reshape(9, -1), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_truncation_cuts_the_features(rank: int) -> None:
    whole, cut = spectrum_of(), spectrum_of().truncate(rank=rank)
    assert cut.rank == rank
    np.testing.assert_array_equal(
        validation_of(cut).features, validation_of(whole).features[:, :rank]
    )
    np.testing.assert_array_equal(
        validation_of(cut).initial_outputs, validation_of(whole).initial_outputs
    )
    again = validated_spectrum(validated_task(), rank=rank)
    np.testing.assert_allclose(
        np.abs(validation_of(again).features), np.abs(validation_of(cut).features)
    )
    predictor = TrainingTimePredictor(cut, target_fraction=0.98, max_steps=20)
    assert "validation_loss" in predictor.predict(0.05, 12, full_curve=True).curves


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((torch.zeros(0, 6), torch.zeros(0).long()), ValueError, "validation_data: .*one sample"),
        ((torch.zeros(3, 6), torch.tensor([0, 1, 3])), ValueError, "validation_data: The labels"),
        ((torch.zeros(3, 6), torch.zeros(3)), TypeError, "validation_data: The targets"),
        (
            (torch.zeros(3, 6), torch.zeros(2).long()),
            ValueError,
            "validation_data: .*a row per sample",
        ),
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
    expected = validation_of(
        validated_spectrum(FineTuningTask(mlp(), (x, y), validation_data=(x[:3], y[:3])))
    )
    dataset = torch.utils.data.TensorDataset(x[:3], y[:3])
    for data in (dataset, torch.utils.data.DataLoader(dataset, batch_size=2)):
        task = FineTuningTask(mlp(), (x, y), validation_data=data)
        np.testing.assert_array_equal(
            validation_of(validated_spectrum(task)).features, expected.features
        )


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
        (mlp, x, ids, r"\(6,\) per sample \(int64, from 0 to 1\)"),
        (_tokens, ids, x, r"\(6,\) per sample \(float32\)"),
        (_tokens, ids, ids + 4, r"\(6,\) per sample \(int64, from 4 to 5\)"),
    ):
        message = rf"The model cannot be run on inputs of shape {form}.*The model says: "
        with pytest.raises(ValueError, match=rf"^{message}"):
            FineTuningTask(model(), (bad, y))
        with pytest.raises(ValueError, match=rf"^validation_data: {message}"):
            FineTuningTask(model(), (good, y), validation_data=(bad, y))
    with pytest.raises(ValueError, match=r"per sample \(int64, from 0 to 7\)"):
        compute_spectrum(FineTuningTask(_tokens(), (large, y)), measure_speed=False)


def test_validation_inputs_that_the_model_cannot_take_are_refused() -> None:
    x, y = vectors()
    message = (
        r"validation_data: The model cannot be run on inputs of shape \(5,\) per sample "
        r"\(float32\); those of the training data have shape \(6,\)"
    )
    with pytest.raises(ValueError, match=message):
        FineTuningTask(mlp(), (x, y), validation_data=(x[:4, :5], y[:4]))
    # Other shapes are fine where the model takes them.
    held_out = torch.randn(4, 1, 12, 12), torch.arange(4) % 3
    task = FineTuningTask(cnn(), images(6), validation_data=held_out)
    assert task.validation is not None
    assert task.validation.n_outputs == 3
