"""Reading samples: what cannot be differentiated sample by sample is refused."""

from __future__ import annotations

from collections.abc import Callable
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU
from tests.ntk.kernels import DTYPES
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


def test_inner_autocast_rounds_but_does_not_break() -> None:
    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs: torch.Tensor = model(x).float()
        return outputs

    one = Case(mlp(), vectors(7))
    jacobian = brute_force_jacobian(one)
    task = FineTuningTask(one.model, one.data, forward=forward)
    gram = exact_kernel(task, device=CPU).gram
    assert relative_error(gram, jacobian @ jacobian.T) < 0.03


class _Writing(torch.nn.Module):
    """A layer that writes to its inputs, its weights or its buffers whenever it runs."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.weight = torch.nn.Parameter(torch.randn(8, 6))
        self.vector: torch.Tensor
        self.register_buffer("vector", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        if self.what == "inputs":
            x.sub_(0.3).mul_(2.0)
        elif self.what == "weights":
            with torch.no_grad():
                weight.div_(weight.norm(dim=1, keepdim=True))
        elif self.what == "weight data":
            weight.data.clamp_(-1.0, 1.0)
        elif self.what == "new weight data":
            weight.data = weight.data / weight.data.norm(dim=1, keepdim=True)
        else:
            # A power iteration (Miyato et al., 2018, arXiv 1802.05957), in any mode.
            with torch.no_grad():
                other = functional.normalize(weight.T @ self.vector, dim=0)
                self.vector = functional.normalize(weight @ other, dim=0)
            weight = weight / (self.vector @ weight @ other)
        return functional.linear(x, weight)


@pytest.mark.parametrize("inner", [False, True], ids=["first", "inner"])
@pytest.mark.parametrize(
    "what", ["inputs", "weights", "weight data", "new weight data", "buffers"]
)
def test_modules_that_write_to_what_is_the_users(
    what: str, inner: bool, device: torch.device
) -> None:
    layers = [_Writing(what), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
    if inner:
        layers.insert(0, torch.nn.Linear(6, 6))
    data = vectors(7)
    model = torch.nn.Sequential(*layers)
    before = copy.deepcopy((model.state_dict(), data))
    jacobian = brute_force_jacobian(Case(copy.deepcopy(model), copy.deepcopy(data)))
    expected = jacobian @ jacobian.T
    task = FineTuningTask(model, data)
    for dtype, tolerance in DTYPES.items():
        kernel = exact_kernel(task, device=device, dtype=dtype)
        assert relative_error(kernel.gram, expected) < tolerance
    largest = np.linalg.eigvalsh(expected)[-1]
    for engine in ("exact", "columns", "matrix_free"):
        spectrum = compute_spectrum(task, engine=engine, device=device)
        assert spectrum.eigenvalues[0] == pytest.approx(largest, rel=1e-4)
    torch.testing.assert_close((model.state_dict(), data), before, rtol=0, atol=0)


def test_weights_that_drift_are_refused() -> None:
    class Drifting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(0.99)
            return super().forward(x)

    model = Drifting(6, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="or write to its own weights"):
        FineTuningTask(model, vectors(7))
    assert torch.equal(model.weight, before)


def test_model_that_casts_to_half_precision_inside_is_no_mixing() -> None:
    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = model(x).to(torch.bfloat16).float()
        return rounded

    gram = exact_kernel(FineTuningTask(mlp(), vectors(4), forward=forward), device=CPU).gram
    expected = exact_kernel(FineTuningTask(mlp(), vectors(4)), device=CPU).gram
    assert relative_error(gram, expected) < 0.02


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: x / x.norm(),
        lambda x: x.cumsum(0),
        lambda x: x.softmax(0),
        lambda x: x.roll(1, 0),
    ],
    ids=["centred", "norm", "cumsum", "softmax", "rolled"],
)
def test_samples_that_mix_across_the_batch_are_refused(
    mix: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> None:
    task = FineTuningTask(mlp(), vectors(), forward=lambda model, x: model(mix(x)))
    with pytest.raises(ValueError, match=r"sample \d+ depend on the other samples of its batch"):
        exact_kernel(task, device=device)


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1, track_running_stats=False), cnn())
    with pytest.raises(ValueError, match="depend on the other samples of its batch"):
        exact_kernel(FineTuningTask(model, images(5)), device=CPU)


def test_gradients_that_are_not_finite_are_refused(device: torch.device) -> None:
    x, y = vectors()
    x[3] = 0
    model = torch.nn.Linear(6, 3, bias=False)
    task = FineTuningTask(model, (x, y), forward=lambda model, x: model(x).abs().sqrt())
    message = "gradient of output 0 of sample 3 must be finite but got NaN"
    with pytest.raises(ValueError, match=message):
        compute_spectrum(task, device=device)


@pytest.mark.parametrize("detach", [torch.Tensor.detach, lambda f: torch.zeros_like(f)])
def test_outputs_without_gradient_are_refused(
    detach: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    task = FineTuningTask(mlp(), vectors(), forward=lambda model, x: detach(model(x)))
    with pytest.raises(ValueError, match="do not depend on any trainable parameter"):
        compute_spectrum(task)
