"""Leading eigenpairs by products with the kernel, against the exact kernel."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.exceptions import ApproximationWarning
from optuna_ttp.exceptions import JacobianMismatchError
from optuna_ttp.jacobian import compute_spectrum
from optuna_ttp.jacobian import exact_kernel
from optuna_ttp.jacobian import plan_spectrum
from optuna_ttp.jacobian import resolve_engine
from optuna_ttp.jacobian._directions import Directions
from optuna_ttp.jacobian._matrix_free import by_directions
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.reference import relative_error


CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"measure_speed": False, "probe": False, "show_progress_bar": False}


def _many_outputs() -> FineTuningTask:
    """More outputs than twice the directions that are followed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 160))
    data = (torch.randn(8, 6), torch.arange(8))
    return FineTuningTask(model, data, validation_data=(torch.randn(3, 6), torch.arange(3)))


def _few_outputs() -> FineTuningTask:
    torch.manual_seed(0)
    x, y = images(40)
    return FineTuningTask(cnn(), (x[:30], y[:30]), validation_data=(x[30:], y[30:]))


def _check(found: Spectrum, exact: Spectrum, rank: int) -> None:
    assert found.rank == rank
    expected = exact.eigenvalues[:rank]
    assert np.abs(found.eigenvalues / expected - 1.0).max() < 0.01
    whole = exact.truncate(rank=rank)
    # The kernel of the leading pairs, whatever the signs and rotations of eigenvectors.
    rebuilt, target = (
        (s.eigenvectors * s.eigenvalues.astype(np.float64)) @ s.eigenvectors.T
        for s in (found, whole)
    )
    assert relative_error(rebuilt, target) < 0.02
    assert found.weight_outputs is not None
    assert exact.weight_outputs is not None
    assert relative_error(found.weight_outputs, exact.weight_outputs) < 1e-4
    assert found.validation is not None
    assert whole.validation is not None
    predictions = (
        s.validation.features @ (np.sqrt(s.eigenvalues) * s.eigenvectors).T  # type: ignore[union-attr]
        for s in (found, whole)
    )
    assert relative_error(*predictions) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pairs_by_rows_are_those_of_the_kernel(dtype: str, device: torch.device) -> None:
    task = _few_outputs()
    assert not by_directions(task, 20, torch.float32, 2**30)
    settings = {**SETTINGS, "device": device, "dtype": dtype}
    exact = compute_spectrum(task, engine="exact", **settings)
    found = compute_spectrum(task, engine="matrix_free", rank=10, **settings)
    assert found.metadata.engine == "matrix_free"
    assert found.metadata.seed == 0
    assert found.trace == pytest.approx(exact.trace, rel=1e-4)
    _check(found, exact, 10)


def test_pairs_by_directions_are_those_of_the_kernel(device: torch.device) -> None:
    task = _many_outputs()
    assert by_directions(task, 20, torch.float32, 2**30)
    exact = compute_spectrum(task, engine="exact", device=device, **SETTINGS)
    found = compute_spectrum(task, engine="matrix_free", rank=10, device=device, **SETTINGS)
    _check(found, exact, 10)
    # Estimated, but for what the pairs hold.
    assert found.trace == pytest.approx(exact.trace, rel=0.1)


@pytest.mark.parametrize("make", [_few_outputs, _many_outputs])
def test_little_memory_changes_nothing(make: Any) -> None:
    task = make()
    roomy, tight = (
        compute_spectrum(task, engine="matrix_free", rank=5, max_memory=m, **SETTINGS)
        for m in (2**30, 40 * task.n_parameters)
    )
    np.testing.assert_allclose(tight.eigenvalues, roomy.eigenvalues, rtol=0.01)


def test_more_pairs_than_there_are() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    exact = compute_spectrum(task, engine="exact", **SETTINGS)
    found = compute_spectrum(task, engine="matrix_free", **SETTINGS)
    n = min(found.rank, exact.rank)
    assert n > 6
    np.testing.assert_allclose(found.eigenvalues[:n], exact.eigenvalues[:n], rtol=1e-2)


def test_a_share_of_the_trace() -> None:
    task = _few_outputs()
    exact = compute_spectrum(task, engine="exact", explained_trace=0.8, **SETTINGS)
    found = compute_spectrum(task, engine="matrix_free", explained_trace=0.8, **SETTINGS)
    assert found.rank == exact.rank
    with pytest.warns(ApproximationWarning, match="eigenpairs hold .* of the trace"):
        compute_spectrum(task, engine="matrix_free", rank=2, explained_trace=0.999, **SETTINGS)


def test_what_has_not_converged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna_ttp.jacobian._matrix_free._MAX_BLOCKS", 1)
    with pytest.warns(ApproximationWarning, match="eigenpairs have not converged"):
        compute_spectrum(_many_outputs(), engine="matrix_free", rank=20, **SETTINGS)


@pytest.mark.parametrize("n_outputs", [3, 400])
def test_a_jacobian_of_zeros_is_refused(n_outputs: int) -> None:
    data = (torch.zeros(4, 5), torch.arange(4) % 3)
    task = FineTuningTask(torch.nn.Linear(5, n_outputs, bias=False), data)
    with pytest.raises(ValueError, match="The Jacobian must not be zero"):
        compute_spectrum(task, engine="matrix_free", rank=5, **SETTINGS)


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch", "matrix_free"])
@pytest.mark.parametrize("run", [compute_spectrum, plan_spectrum, resolve_engine])
def test_multipliers_are_refused(run: Any, engine: str) -> None:
    task = FineTuningTask(mlp(), vectors(4), learning_rate_multipliers={"0.b": 2.0})
    message = (
        f'learning_rate_multipliers must all be one for the engine "{engine}" but got 2.0 for '
        "'0.bias'. Use engine=\"exact\""
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(task, engine=engine)
    assert plan_spectrum(task).engine == "exact"


# Products one direction at a time


class _Doubled(torch.autograd.Function):
    """Without a derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2.0 * gradients[0]


class _OldStyle(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(5, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        apply: Any = _Doubled.apply
        outputs: torch.Tensor = self.head(torch.tanh(apply(self.inner(x))))
        return outputs


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 24)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        outputs: torch.Tensor = self.head(mixed.transpose(1, 2).flatten(2).mean(1))
        return outputs


def _encoder() -> torch.nn.Module:
    """Whose fast path in evaluation mode knows no forward mode."""
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(28, 3))


@pytest.mark.parametrize(
    ("make", "shape", "mode"),
    [
        (cnn, None, "forward"),
        (_Attention, (7, 4), "forward of plain attention"),
        (_encoder, (7, 4), "forward of plain attention"),
        (_OldStyle, (5,), "two backward passes"),
    ],
    ids=["cnn", "attention", "encoder layer", "custom function"],
)
def test_products_with_the_kernel(make: Any, shape: tuple[int, ...] | None, mode: str) -> None:
    torch.manual_seed(0)
    data = images(6) if shape is None else (torch.randn(6, *shape), torch.arange(6) % 3)
    one = Case(make(), data)
    task = FineTuningTask(one.model, one.data)
    kernel = exact_kernel(task, device=CPU, show_progress_bar=False)
    vectors = torch.randn(len(kernel.gram), 3)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    with task.frozen(CPU, torch.float32) as frozen:
        directions = Directions(task, frozen, CPU, torch.float32, 2**20)
        found = directions.images(vectors)
    assert directions.mode == mode
    expected = kernel.gram.astype(np.float64) @ vectors.double().numpy()
    assert relative_error(found.numpy(), expected) < 1e-5
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_products_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Directions._forward_mode

    def wrong(self: Directions, *args: Any) -> torch.Tensor:
        return 1.1 * right(self, *args)

    monkeypatch.setattr(Directions, "_forward_mode", wrong)
    with pytest.raises(JacobianMismatchError, match="A product with the Jacobian by forward"):
        compute_spectrum(_many_outputs(), engine="matrix_free", rank=5, **SETTINGS)


_WARNINGS = """
import warnings

import torch

from optuna_ttp import compute_spectrum, FineTuningTask

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    torch.nn.Flatten(),
    torch.nn.PReLU(),
    torch.nn.Linear(12, 160),
)
task = FineTuningTask(model, (torch.randn(6, 3, 4), torch.arange(6)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for engine in ("exact", "sketch", "refined_sketch", "matrix_free"):
        compute_spectrum(task, engine=engine, rank=5)
print(*[w.message for w in caught if issubclass(w.category, (DeprecationWarning, FutureWarning))])
# The user's own are not lost.
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.jit.script(torch.nn.Identity())
print(any("torch.jit.script" in str(w.message) for w in caught))
"""


def test_no_deprecation_of_torchs_own_reaches_the_user() -> None:
    # Forward mode loads what it needs once a process.
    done = subprocess.run(
        [sys.executable, "-c", _WARNINGS], capture_output=True, text=True, check=True
    )
    silent, own = done.stdout.splitlines()
    assert silent == ""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert own == "True" or version < (2, 13)
