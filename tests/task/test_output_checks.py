"""Models whose outputs cannot be used are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.task import FineTuningTask
from tests.models import mlp
from tests.models import vectors


CPU = torch.device("cpu")


class Wrapped(torch.nn.Module):
    """A network whose outputs are changed by a function."""

    def __init__(self, change: Callable[[torch.Tensor], Any], seed: int = 0) -> None:
        super().__init__()
        self.inner = mlp(seed=seed)
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.inner(x))


@pytest.mark.parametrize("n_samples", [1, 2, 65])
@pytest.mark.parametrize("shape", [(8,), (8, 3, 3)], ids=["1d", "2d"])
def test_statistics_of_the_batch_are_refused_by_name(
    shape: tuple[int, ...], n_samples: int
) -> None:
    kind = torch.nn.BatchNorm1d if len(shape) == 1 else torch.nn.BatchNorm2d
    model = torch.nn.Sequential()
    model.add_module("norm", kind(8, track_running_stats=False))
    model.add_module("flat", torch.nn.Flatten())
    model.add_module("head", torch.nn.LazyLinear(3))
    model(torch.randn(4, *shape))
    data = torch.randn(n_samples, *shape), torch.zeros(n_samples, dtype=torch.long)
    message = "depend on the other samples of its batch.*'norm'.*track_running_stats=False"
    with pytest.raises(ValueError, match=message):
        FineTuningTask(model, data)
    # Where it does not run, it mixes nothing.
    head: Any = model[2]
    task = FineTuningTask(model, data, forward=lambda _, x: head(x.flatten(1)))
    assert task.n_outputs == 3


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda f: f[:, 0], r"\(2,\)"),
        (lambda f: f[:, None, :], r"\(2, 1, 3\)"),
        (lambda f: f.sum(), r"\(\)"),
        (lambda f: f[:1], r"\(1, 3\)"),
    ],
    ids=["1-D", "3-D", "scalar", "another batch"],
)
def test_outputs_that_are_not_batch_by_c_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], shape: str
) -> None:
    with pytest.raises(ValueError, match=rf"shape \(batch, C\) but got {shape} for a batch of 2"):
        FineTuningTask(Wrapped(change), vectors())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda f: (f, f), "tuple"),
        (lambda f: {"scores": f}, "dict"),
        (lambda f: None, "NoneType"),
        (lambda f: f.argmax(dim=1, keepdim=True), "torch.int64"),
    ],
    ids=["tuple", "dict", "none", "integers"],
)
def test_outputs_that_are_no_floating_point_tensor_are_refused(
    change: Callable[[torch.Tensor], Any], kind: str
) -> None:
    with pytest.raises(TypeError, match=rf"got {kind}\. Pass forward="):
        FineTuningTask(Wrapped(change), vectors())


def test_forward_picks_the_outputs() -> None:
    model = Wrapped(lambda f: (f, None))
    task = FineTuningTask(model, vectors(), forward=lambda model, x: model(x)[0])
    assert task.n_outputs == 3


def test_model_that_squeezes_a_batch_of_one_is_refused(device: torch.device) -> None:
    # 65 samples: the last batch that is read has one.
    task = FineTuningTask(Wrapped(torch.squeeze), vectors(65))
    with pytest.raises(ValueError, match=r"shape \(batch, 3\) but got \(3,\) for a batch of 1"):
        task.initial_outputs(device)
    task = FineTuningTask(Wrapped(torch.squeeze), vectors(4))
    with pytest.raises(ValueError, match=r"\(1, 3\) for a batch of one but got \(3,\)"):
        exact_kernel(task, device=device)


def test_random_outputs_are_refused() -> None:
    model = Wrapped(lambda f: torch.nn.functional.dropout(f, 0.5))
    with pytest.raises(ValueError, match=r"the same every time.*functional\.dropout"):
        FineTuningTask(model, vectors())


def test_outputs_that_are_not_finite_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="outputs must be finite"):
        FineTuningTask(Wrapped(lambda f: f / 0), vectors())
    x, y = vectors(70)
    x[67] = 0
    task = FineTuningTask(
        mlp(), (x, y), forward=lambda model, x: model(x) / x.abs().sum(1, keepdim=True)
    )
    with pytest.raises(ValueError, match="for 1 of 70 samples, the first one sample 67"):
        task.initial_outputs(device)
    with pytest.raises(ValueError, match="for 1 of 70 samples, the first one sample 67"):
        compute_spectrum(task, device=device)


def test_dropout_layers_are_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), mlp()).train()
    x, y = vectors()
    task = FineTuningTask(model, (x, y))
    expected = model[1](x).detach().numpy()
    np.testing.assert_allclose(task.initial_outputs(CPU), expected, rtol=1e-5, atol=1e-6)
