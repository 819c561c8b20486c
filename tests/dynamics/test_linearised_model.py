from __future__ import annotations

import numpy as np
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.task import Loss
from tests.cases import spectrum
from tests.dynamics.simulations import double
from tests.dynamics.simulations import LOSSES


def test_features_reproduce_the_kernel_and_the_initial_outputs() -> None:
    one = spectrum()
    model = double(one)
    features = model.features.reshape(36, -1).numpy()
    kernel = (one.eigenvectors * one.eigenvalues) @ one.eigenvectors.T
    np.testing.assert_allclose(features @ features.T, kernel, atol=1e-12 * one.eigenvalues[0])
    theta = torch.zeros(2, one.rank, dtype=torch.float64)
    for outputs in model.outputs(theta):
        np.testing.assert_array_equal(outputs.numpy(), one.initial_outputs)


def test_normaliser_of_a_weighted_loss_is_that_of_its_samples() -> None:
    one = spectrum(Loss("cross_entropy", 0.0, (1.0, 2.0, 4.0)))
    expected = np.array([1.0, 2.0, 4.0])[one.targets]
    np.testing.assert_array_equal(double(one).normalisers.numpy(), expected)


def test_restricted_model_is_the_model_of_the_samples() -> None:
    model = LinearisedModel.from_spectrum(spectrum(), dtype=torch.float64)
    chosen = torch.tensor([7, 2, 11])
    part = model.restricted(chosen)
    theta = torch.randn(2, model.rank, generator=torch.Generator().manual_seed(0)).double()
    outputs = model.outputs(theta)[:, chosen]
    np.testing.assert_allclose(part.outputs(theta), outputs, rtol=1e-12)
    labels = torch.as_tensor(spectrum().targets[chosen.numpy()])
    expected = [float(torch.nn.functional.cross_entropy(o, labels)) for o in outputs]
    np.testing.assert_allclose(part.loss(outputs), expected)
    assert part.n_samples == 3


def test_single_real_output_has_no_accuracy() -> None:
    model = double(spectrum("mse", n_outputs=1))
    with pytest.raises(ValueError, match="no accuracy"):
        model.accuracy(model.initial_outputs[None])


@pytest.mark.parametrize("loss", LOSSES)
def test_curvatures_are_eigenvalues_of_the_hessian(loss: str) -> None:
    model = double(spectrum(LOSSES[loss]))
    theta = torch.zeros(model.features.shape[2], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda t: model.loss(model.outputs(t[None]))[0], theta
    )
    expected = torch.linalg.eigvalsh(hessian).flip(0).clamp(min=0).numpy()
    np.testing.assert_allclose(model.curvatures, expected, rtol=1e-9, atol=1e-13)
