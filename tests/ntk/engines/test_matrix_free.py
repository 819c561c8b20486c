"""Leading eigenpairs by products with the kernel, against the exact kernel."""

from __future__ import annotations

from dataclasses import replace
import linecache
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp import ApproximationWarning
from optuna_ttp import JacobianMismatchError
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk import resolve_engine
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines import _matrix_free
from optuna_ttp.ntk.engines._matrix_free import by_directions
from optuna_ttp.ntk.engines._rules import PAIRS
from optuna_ttp.ntk.jacobian._directions import Directions
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.gradient_flow import follow_flow
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
    assert found.rank == rank + found.metadata.n_ritz
    assert 0 < found.metadata.n_ritz <= 25
    gram = found.eigenvectors.T @ found.eigenvectors
    np.testing.assert_allclose(gram, np.eye(found.rank), atol=1e-4)
    found = found.truncate(rank=rank)
    assert found.metadata.n_ritz == 0
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
    # In products by rows they are difference quotients.
    quotient = found.metadata.dtype == "float32" and exact.n_outputs == 3
    assert relative_error(found.weight_outputs, exact.weight_outputs) < (
        1e-3 if quotient else 1e-4
    )
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
    assert exact.metadata.trace_error is None


def test_a_trace_that_is_an_estimate_says_how_good_it_is() -> None:
    task = _many_outputs()
    exact = compute_spectrum(task, engine="exact", **SETTINGS)
    away = []
    for seed in range(12):
        found = compute_spectrum(task, engine="matrix_free", rank=5, seed=seed, **SETTINGS)
        error = found.metadata.trace_error
        assert error is not None
        assert 0.0 < error < 0.05
        assert f"trace is an estimate to {error:.1%}" in repr(found)
        assert Spectrum.from_bytes(found.to_bytes()).metadata == found.metadata
        away.append((found.trace / exact.trace - 1.0) / error)
    # Standard errors: as many above as below, and nearly all within three.
    assert abs(np.mean(away)) < 1.0
    assert np.abs(away).max() < 4.0


@pytest.mark.parametrize("make", [_few_outputs, _many_outputs])
def test_little_memory_changes_nothing(make: Any) -> None:
    task = make()
    roomy, tight = (
        compute_spectrum(task, engine="matrix_free", rank=5, max_memory=m, **SETTINGS).truncate(
            rank=5
        )
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


def _slowly_decaying(loss: str, n_held_out: int = 0) -> FineTuningTask:
    """Whose leading 100 eigenvalues hold two thirds of the trace."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 10),
    )
    x, y = images(100 + n_held_out, 10)
    x = x + 0.7 * torch.randn(10, 1, 8, 8)[y]
    targets = y if loss == "cross_entropy" else torch.nn.functional.one_hot(y, 10).float()
    held_out = (x[100:], targets[100:]) if n_held_out else None
    return FineTuningTask(model, (x[:100], targets[:100]), loss=loss, validation_data=held_out)


@pytest.mark.filterwarnings("error::optuna_ttp.ApproximationWarning")
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_times_do_not_suffer_from_what_leading_pairs_leave_out(loss: str) -> None:
    task = _slowly_decaying(loss)
    exact, found = (compute_spectrum(task, engine=e, **SETTINGS) for e in ("exact", "matrix_free"))
    leading = found.truncate(rank=100)
    assert leading.explained_trace < 0.75
    times, ours, cut = (follow_flow(s, rank=s.rank).times for s in (exact, found, leading))
    np.testing.assert_allclose(ours, times, rtol=0.03)
    # What the Ritz pairs are for.
    assert cut[-1] > 3.0 * times[-1]
    error = found.metadata.time_error
    assert error is not None
    assert 0.0 < error <= 0.1
    assert np.abs(ours / times - 1.0).max() <= error
    rate = 0.2 * task.n_samples / float(exact.eigenvalues[0])
    steps = [
        TrainingTimePredictor(s, target_fraction=0.2, max_steps=20_000)
        .predict(learning_rate=rate, batch_size=25, momentum=0.5)
        .steps
        for s in (exact, found)
    ]
    assert steps[1] == pytest.approx(steps[0], rel=0.05)


def test_what_the_residual_sees_reaches_validation_samples() -> None:
    task = _slowly_decaying("mse", 20)
    moved = []
    for engine in ("exact", "matrix_free"):
        one = compute_spectrum(task, engine=engine, **SETTINGS)
        assert one.validation is not None
        residual = one.loss.residuals(one.initial_outputs, one.targets).ravel()
        roots = np.sqrt(one.eigenvalues)
        moved.append(one.validation.features @ (roots * (one.eigenvectors.T @ residual)))
    # The first step of training.
    assert relative_error(moved[1], moved[0]) < 0.01


def test_times_that_have_not_converged_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = replace(PAIRS, max_narrow_blocks=0, pair_tolerance=10.0)
    monkeypatch.setattr(_matrix_free, "PAIRS", rules)
    with pytest.warns(ApproximationWarning, match="leave predicted times of unknown error"):
        found = compute_spectrum(_slowly_decaying("mse"), engine="matrix_free", **SETTINGS)
    assert found.metadata.time_error == float("inf")


def test_nothing_to_learn() -> None:
    model = mlp()
    x, _ = vectors(40)
    task = FineTuningTask(model, (x, model(x).detach()), loss="mse")
    found = compute_spectrum(task, engine="matrix_free", rank=5, **SETTINGS)
    assert (found.rank, found.metadata.n_ritz, found.metadata.time_error) == (5, 0, 0.0)


def test_ritz_pairs_are_stored_beside_the_rank_that_was_asked_for(tmp_path: Any) -> None:
    store = SpectrumStore(f"sqlite:///{tmp_path / 'ttp.db'}")
    task = _few_outputs()
    found = store.get_or_compute(task, engine="matrix_free", rank=5, **SETTINGS)
    again = store.get(task, engine="matrix_free", rank=5)
    assert again is not None
    assert again.rank == found.rank > 5
    assert again.metadata.n_ritz == found.rank - 5


def test_a_share_of_the_trace() -> None:
    task = _few_outputs()
    exact = compute_spectrum(task, engine="exact", explained_trace=0.8, **SETTINGS)
    found = compute_spectrum(task, engine="matrix_free", explained_trace=0.8, **SETTINGS)
    assert found.rank == exact.rank
    with pytest.warns(ApproximationWarning, match="eigenpairs hold .* of the trace"):
        compute_spectrum(task, engine="matrix_free", rank=2, explained_trace=0.999, **SETTINGS)


@pytest.mark.parametrize("n_outputs", [3, 400])
def test_warnings_point_to_the_users_line(
    n_outputs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(_matrix_free, "PAIRS", replace(PAIRS, max_blocks=1))
    task = _few_outputs() if n_outputs == 3 else _many_outputs()
    asked = {"engine": "matrix_free", "rank": 5, "explained_trace": 0.999, **SETTINGS}
    store = SpectrumStore(f"sqlite:///{tmp_path / 'ttp.db'}")
    with pytest.warns(ApproximationWarning) as found:
        compute_spectrum(task, **asked)
    with pytest.warns(ApproximationWarning) as stored:
        store.get_or_compute(task, **asked)
    for records, call in ((found, "compute_spectrum("), (stored, "get_or_compute(")):
        assert len(records) >= 2
        for record in records:
            assert record.filename == __file__
            assert call in linecache.getline(__file__, record.lineno)


def test_what_has_not_converged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matrix_free, "PAIRS", replace(PAIRS, max_blocks=1))
    with (
        pytest.warns(ApproximationWarning, match="eigenpairs have not converged"),
        pytest.warns(ApproximationWarning, match="leave predicted times of unknown error"),
    ):
        compute_spectrum(_many_outputs(), engine="matrix_free", rank=20, **SETTINGS)


@pytest.mark.parametrize("n_outputs", [3, 400])
def test_a_jacobian_of_zeros_is_refused(n_outputs: int) -> None:
    data = (torch.zeros(4, 5), torch.arange(4) % 3)
    task = FineTuningTask(torch.nn.Linear(5, n_outputs, bias=False), data)
    with pytest.raises(ValueError, match="The Jacobian must not be zero"):
        compute_spectrum(task, engine="matrix_free", rank=5, **SETTINGS)


@pytest.mark.parametrize("run", [compute_spectrum, plan_spectrum, resolve_engine])
def test_multipliers_are_refused(run: Any) -> None:
    task = FineTuningTask(mlp(), vectors(4), learning_rate_multipliers={"0.b": 2.0})
    message = (
        'learning_rate_multipliers must all be one for the engine "matrix_free" but got 2.0 for '
        "'0.bias'. Use engine=\"columns\""
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(task, engine="matrix_free")
    assert plan_spectrum(task).engine == "columns"


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
        directions = Directions(task, frozen, EngineSettings(CPU, max_memory=2**21))
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
    torch.nn.Linear(12, 40),
)
task = FineTuningTask(model, (torch.randn(6, 3, 4), torch.arange(6)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for engine in ("exact", "columns", "matrix_free"):
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
