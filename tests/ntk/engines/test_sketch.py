"""Sketches of the Jacobian against the exact kernel."""

from __future__ import annotations

from dataclasses import replace
import linecache
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import pytest
import torch

from optuna_ttp import ApproximationWarning
from optuna_ttp import JacobianMismatchError
from optuna_ttp.ntk import _decomposition
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import eigenpairs
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk import resolve_engine
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines import _choice
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs_of_features
from optuna_ttp.ntk.engines._projection import SignFold
from optuna_ttp.ntk.engines._refine import refine
from optuna_ttp.ntk.engines._rules import CHOICE
from optuna_ttp.ntk.engines._rules import SKETCHES
from optuna_ttp.ntk.engines._sketch import sketch_jacobian
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.gradient_flow import follow_flow
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import separated
from tests.models import vectors
from tests.reference import relative_error
from tests.ternary import Ternary


CPU = torch.device("cpu")


def _wide() -> FineTuningTask:
    """More weights than a sketch has numbers, and a table that many tokens index."""
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(120, 24)
            self.wide = torch.nn.Linear(24, 100)
            self.head = torch.nn.Linear(100, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.head(torch.tanh(self.wide(self.table(tokens))).mean(1))
            return outputs

    tokens = torch.randint(120, (14, 5))
    return FineTuningTask(
        Model(), (tokens, torch.arange(14) % 3), validation_data=(tokens[:4], torch.arange(4) % 3)
    )


@pytest.mark.parametrize("projection", [SignFold, Ternary])
def test_a_sketch_is_right_in_expectation(projection: Any, device: torch.device) -> None:
    task = _wide()
    exact = exact_kernel(task, device=device, dtype=torch.float64)
    errors, means = [], np.zeros_like(exact.gram)
    n_seeds = 30
    for seed in range(n_seeds):
        sketch = sketch_jacobian(
            task,
            EngineSettings(device, torch.float64, seed=seed, show_progress_bar=False),
            width=128,
            projection=projection,
        )
        features = sketch.features().cpu().numpy()
        errors.append(relative_error(features @ features.T, exact.gram))
        means += features @ features.T / n_seeds
    assert 0.01 < np.mean(errors) < 0.5
    # The mean of independent unbiased estimates is off by the root of their number less.
    assert relative_error(means, exact.gram) < 1.6 * np.mean(errors) / n_seeds**0.5


def test_what_a_sketch_keeps_exactly(device: torch.device) -> None:
    task = _wide()
    exact = exact_kernel(task, device=device, dtype=torch.float64)
    sketch = sketch_jacobian(task, EngineSettings(device, torch.float64), width=2048)
    assert sketch.trace == pytest.approx(np.trace(exact.gram), rel=1e-10)
    np.testing.assert_allclose(sketch.weight_outputs, exact.weight_outputs, rtol=1e-9, atol=1e-9)
    # The head and the bias: 300, 3 and 100 weights.
    assert sketch.exact.shape == (42, 403)
    assert [g.shape for g in sketch.groups] == [(42, 512)] * 4
    one, other = (g @ g.T for g in sketch.groups[:2])
    assert relative_error(one.cpu().numpy(), other.cpu().numpy()) > 1e-3
    again = sketch_jacobian(task, EngineSettings(device, torch.float64), width=2048)
    torch.testing.assert_close(again.features(), sketch.features(), rtol=0, atol=0)


def test_validation_samples_are_projected_alike() -> None:
    task = _wide()
    exact = exact_kernel(task, device=CPU, dtype=torch.float64)
    sketch = sketch_jacobian(task, EngineSettings(CPU, torch.float64), width=4096)
    others = sketch.validation_features()
    assert others is not None
    assert exact.cross is not None
    assert relative_error((others @ sketch.features().T).numpy(), exact.cross) < 0.1


def test_refined_pairs_are_nearly_exact() -> None:
    task = FineTuningTask(cnn(), images(20))
    exact = eigenpairs(exact_kernel(task, device=CPU, dtype=torch.float64).gram)
    sketch = sketch_jacobian(task, EngineSettings(CPU, torch.float64), width=64)
    features = sketch.features()
    rough = eigenpairs_of_features(features, rank=20, trace=sketch.trace)
    found, _ = refine(task, features, rough, EngineSettings(CPU, torch.float64), n_refined=20)
    refined = eigenpairs_of_features(found)

    def errors(values: Any) -> Any:
        return np.abs(values[:8] / exact.eigenvalues[:8] - 1.0).max()

    assert errors(rough.eigenvalues) > 0.02
    assert errors(refined.eigenvalues) < 0.2 * errors(rough.eigenvalues)


def test_refining_in_several_passes_changes_nothing() -> None:
    task = _wide()
    sketch = sketch_jacobian(task, EngineSettings(CPU, torch.float64), width=64)
    features = sketch.features()
    pairs = eigenpairs_of_features(features, rank=10)
    settings = EngineSettings(CPU, torch.float64)
    others = sketch.validation_features()
    whole, whole_others = refine(task, features, pairs, settings, n_refined=10, others=others)
    parts, parts_others = refine(
        task, features, pairs, replace(settings, max_memory=1), n_refined=10, others=others
    )
    torch.testing.assert_close(parts @ parts.T, whole @ whole.T)
    assert whole_others is not None
    assert parts_others is not None
    torch.testing.assert_close(parts_others @ parts.T, whole_others @ whole.T)


def _decaying() -> FineTuningTask:
    """More outputs than eigenpairs are refined."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 120),
        torch.nn.Tanh(),
        torch.nn.Linear(120, 120),
        torch.nn.Tanh(),
        torch.nn.Linear(120, 4),
    )
    x = torch.randn(120, 20) @ torch.logspace(0.5, -1.5, 20).diag()
    y = x[:, :4].argmax(1)
    return FineTuningTask(model, (x[:80], y[:80]), validation_data=(x[80:], y[80:]))


@pytest.mark.parametrize("make", [_wide, _decaying], ids=["all of it", "leading part"])
def test_validation_samples_are_refined_as_training_samples_are(make: Any) -> None:
    task = make()
    expected = exact_kernel(task, device=CPU, dtype=torch.float64).cross
    assert expected is not None
    errors = {}
    for engine in ("sketch", "refined_sketch"):
        one = compute_spectrum(task, engine=engine, measure_speed=False, show_progress_bar=False)
        assert one.validation is not None
        cross = (one.validation.features * np.sqrt(one.eigenvalues)) @ one.eigenvectors.T
        errors[engine] = relative_error(cross, expected)
    assert errors["refined_sketch"] < 0.1 * errors["sketch"]


def test_training_samples_held_out_are_refined_like_themselves() -> None:
    model, (x, y) = cnn(), images(20)
    task = FineTuningTask(model, (x, y), validation_data=(x[3:7], y[3:7]))
    sketch = sketch_jacobian(task, EngineSettings(CPU, torch.float64), width=64)
    features, others = sketch.features(), sketch.validation_features()
    pairs = eigenpairs_of_features(features, rank=20)
    found, found_others = refine(
        task, features, pairs, EngineSettings(CPU, torch.float64), n_refined=20, others=others
    )
    assert found_others is not None
    # But for the shift that keeps roots defined.
    assert relative_error(found_others.numpy(), found[9:21].numpy()) < 1e-3


@pytest.mark.parametrize("shape", [(9, 30), (30, 9)], ids=["wide", "tall"])
def test_eigenpairs_of_features_are_those_of_the_products(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    pairs = eigenpairs_of_features(features, rank=6)
    expected = eigenpairs((features @ features.T).numpy(), rank=6)
    np.testing.assert_allclose(pairs.eigenvalues, expected.eigenvalues, rtol=1e-10)
    overlaps = np.abs((pairs.eigenvectors * expected.eigenvectors).sum(axis=0))
    np.testing.assert_allclose(overlaps, 1.0, rtol=1e-9)
    assert pairs.trace == pytest.approx(expected.trace)
    assert eigenpairs_of_features(features, rank=6, trace=99.0).trace == 99.0


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch"])
def test_predicted_times_of_a_sketch(engine: str) -> None:
    x, y = separated(30)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 80),
        torch.nn.Tanh(),
        torch.nn.Linear(80, 80),
        torch.nn.Tanh(),
        torch.nn.Linear(80, 3),
    )
    task = FineTuningTask(model, (x, y))
    exact = compute_spectrum(task, engine="exact", measure_speed=False, probe=False)
    sketch = compute_spectrum(task, engine=engine, measure_speed=False, probe=False)
    assert (exact.metadata.sketch_width, exact.metadata.time_error) == (None, None)
    assert (sketch.metadata.engine, sketch.metadata.sketch_width) == (engine, 4096)
    assert sketch.metadata.seed == 0
    error = sketch.metadata.time_error
    assert error is not None
    assert error < 0.03
    away = np.abs(follow_flow(sketch).times / follow_flow(exact).times - 1.0)
    assert np.isfinite(away).all()
    assert (away < 0.03).all()
    assert Spectrum.from_bytes(sketch.to_bytes()).metadata == sketch.metadata


def _set_widths(monkeypatch: pytest.MonkeyPatch, first: int, widest: int) -> None:
    rules = replace(CHOICE, sketch_width=first, max_sketch_width=widest)
    for module in (_decomposition, _choice):
        monkeypatch.setattr(module, "CHOICE", rules)


@pytest.mark.filterwarnings("ignore::optuna_ttp.ApproximationWarning")
@pytest.mark.parametrize("engine", ["sketch", "refined_sketch"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_error_bar_covers(engine: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine errors in ten; of 36 at least 26, which chance leaves in 999 cases of 1,000."""
    _set_widths(monkeypatch, 512, 512)
    monkeypatch.setattr(_decomposition, "SKETCHES", replace(SKETCHES, n_refined=20))
    x, y = separated(30)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 80), torch.nn.Tanh(), torch.nn.Linear(80, 80), torch.nn.Tanh()
    )
    model.append(torch.nn.Linear(80, 3))
    targets = y if loss == "cross_entropy" else torch.nn.functional.one_hot(y, 3).float()
    task = FineTuningTask(model, (x, targets), loss=loss)
    settings: dict[str, Any] = {"measure_speed": False, "probe": False}
    exact = follow_flow(compute_spectrum(task, engine="exact", **settings)).times
    assert np.isfinite(exact).all()
    within: list[bool] = []
    bars = []
    for seed in range(12):
        found = compute_spectrum(task, engine=engine, seed=seed, **settings)
        assert found.metadata.time_error is not None
        bars.append(found.metadata.time_error)
        within.extend(np.abs(follow_flow(found).times / exact - 1.0) <= bars[-1])
    assert sum(within) >= 26
    # And it says something.
    assert np.median(bars) < 0.5


def test_a_spectrum_that_hardly_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leading 200 directions never reach half of the loss, and every time is too long."""
    # One sketch, because those before the last one say nothing.
    _set_widths(monkeypatch, 8192, 8192)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1500, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    task = FineTuningTask(model, (torch.randn(200, 1500), torch.arange(200) % 5))
    exact = compute_spectrum(task, engine="exact", measure_speed=False, probe=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        sketch = compute_spectrum(task, engine="sketch", measure_speed=False, probe=False)
    error = sketch.metadata.time_error
    assert error is not None
    times = [follow_flow(s, rank=s.rank).times for s in (exact, sketch)]
    assert np.isfinite(times[0]).all()
    assert np.abs(times[1] / times[0] - 1.0).max() < 2.0 * error


def test_a_sketch_that_is_not_wide_enough_warns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _set_widths(monkeypatch, 16, 32)
    with pytest.warns(
        ApproximationWarning, match="The sketch of width 32 leaves predicted times"
    ) as said:
        found = compute_spectrum(_wide(), engine="sketch", measure_speed=False, probe=False)
    assert found.metadata.sketch_width == 32
    # They point to the user's line, whatever is between.
    store = SpectrumStore(f"sqlite:///{tmp_path / 'ttp.db'}")
    settings: dict[str, Any] = {"engine": "sketch", "measure_speed": False, "probe": False}
    with pytest.warns(ApproximationWarning) as stored:
        store.get_or_compute(_wide(), **settings)
    for record, call in ((said[0], "compute_spectrum("), (stored[0], "get_or_compute(")):
        assert record.filename == __file__
        assert call in linecache.getline(__file__, record.lineno)


class _Recurrent(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.recurrent = torch.nn.LSTM(4, width, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.recurrent(x)[0][:, -1])
        return outputs


def _slow() -> FineTuningTask:
    """Eigenvalues that are so far apart that half of the loss takes too many steps."""
    torch.manual_seed(0)
    return FineTuningTask(_Recurrent(5), (torch.randn(6, 7, 4), torch.arange(6) % 3))


def _contradictory() -> FineTuningTask:
    """One sample with several labels: half of the loss is never reached."""
    torch.manual_seed(0)
    x = torch.randn(1, 7, 4).repeat(6, 1, 1)
    return FineTuningTask(_Recurrent(40), (x, torch.tensor([0, 0, 1, 0, 2, 0])))


def _quiet_spectrum(task: FineTuningTask, engine: str) -> Spectrum:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ApproximationWarning)
        return compute_spectrum(
            task, engine=engine, measure_speed=False, probe=False, show_progress_bar=False
        )


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch"])
def test_a_sketch_that_projects_nothing_is_exact(engine: str) -> None:
    task = _slow()
    one, exact = (_quiet_spectrum(task, e) for e in (engine, "exact"))
    assert np.isinf(follow_flow(one, rank=one.rank).times).all()
    np.testing.assert_allclose(one.eigenvalues[:3], exact.eigenvalues[:3], rtol=1e-5)
    assert one.metadata.time_error == 0.0
    assert one.metadata.sketch_width == 4096


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch"])
def test_the_error_is_known_where_half_of_the_loss_is_not_reached(engine: str) -> None:
    task = _contradictory()
    one, exact = (_quiet_spectrum(task, e) for e in (engine, "exact"))
    assert np.isinf(follow_flow(one, rank=one.rank).times).all()
    error = one.metadata.time_error
    assert error is not None
    assert 0.0 < error <= 0.03
    flows = [follow_flow(s, fractions=(0.95, 0.9, 0.85)) for s in (exact, one)]
    assert np.isfinite(flows[0].times).all()
    assert flows[0].left < 0.85
    assert np.abs(flows[1].times / flows[0].times - 1.0).max() < 3.0 * error


def test_the_engine_is_chosen_by_sizes_alone() -> None:
    task = FineTuningTask(mlp(), vectors(20))
    assert resolve_engine(task)[0] == "exact"
    # Not even a sketch.
    assert resolve_engine(task, max_memory=60_000)[0] == "matrix_free"
    many = FineTuningTask(mlp(), vectors(500))
    assert resolve_engine(many, max_memory=50_000_000)[0] == "sketch"
    wide = FineTuningTask(torch.nn.Linear(4, 600), (torch.randn(3, 4), torch.arange(3)))
    assert resolve_engine(wide, max_memory=70_000_000)[0] == "matrix_free"
    assert resolve_engine(task, "sketch") == ("sketch", "asked for")
    tuned = FineTuningTask(mlp(), vectors(20), learning_rate_multipliers={"0.": 2.0})
    assert resolve_engine(tuned, max_memory=60_000)[0] == "exact"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 3}, "width must be a positive multiple of 4 but got 3"),
        ({"width": 0}, "width must be a positive multiple of 4"),
    ],
    ids=str,
)
def test_bad_settings_of_a_sketch_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sketch_jacobian(FineTuningTask(mlp(), vectors(4)), EngineSettings(CPU), **settings)


def test_multipliers_are_refused() -> None:
    task = FineTuningTask(mlp(), vectors(4), learning_rate_multipliers={"0.": 2.0})
    with pytest.raises(ValueError, match="learning_rate_multipliers must all be one"):
        sketch_jacobian(task, EngineSettings(CPU), width=8)


def test_a_budget_that_is_too_small_is_refused() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    with pytest.raises(ValueError, match=r"max_memory must be at least .* for a sketch of 12"):
        compute_spectrum(task, engine="sketch", max_memory=1000)


def test_rows_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_ttp.ntk.jacobian import _state

    right = _state.StateBuilder.finish

    def wrong(builder: _state.StateBuilder) -> _state.BlockState:
        state = right(builder)
        state.rows.mul_(1.1)
        return state

    monkeypatch.setattr(_state.StateBuilder, "finish", wrong)
    with pytest.raises(JacobianMismatchError, match="The squared gradient of output"):
        sketch_jacobian(FineTuningTask(cnn(), images(6)), EngineSettings(CPU), width=64)


@pytest.mark.parametrize("name", ["gru", "multi-head attention", "dict inputs", "weight norm"])
def test_sketches_of_other_architectures(name: str, device: torch.device) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    exact = exact_kernel(task, device=device).gram
    # Wider than there are weights: only signs are changed, and shifted parameters may meet.
    sketch = sketch_jacobian(task, EngineSettings(device), width=65_536)
    features = sketch.features().cpu().numpy()
    assert relative_error(features @ features.T, exact) < 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sketch.trace == pytest.approx(float(np.trace(exact)), rel=1e-4)


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch"])
def test_a_model_that_has_nothing_left_to_learn_can_be_sketched(engine: str) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(6, 4)
    task = FineTuningTask(model, (x, model(x).detach()), loss="mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spectrum = compute_spectrum(
            task, engine=engine, measure_speed=False, probe=False, show_progress_bar=False
        )
    assert spectrum.rank == 15


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch", "matrix_free"])
def test_a_checkpoint_that_nothing_would_use_is_refused(engine: str) -> None:
    class Nothing:
        def load(self, name: str) -> None:
            return None

    with pytest.raises(ValueError, match=f'checkpoint must be None for the engine "{engine}"'):
        compute_spectrum(
            FineTuningTask(mlp(), vectors(4)),
            engine=engine,
            checkpoint=Nothing(),  # type: ignore[arg-type]
        )


def test_a_plan_says_that_a_sketch_may_become_wider() -> None:
    task = FineTuningTask(mlp(), vectors(9))
    told = {e: str(plan_spectrum(task, engine=e)) for e in ("sketch", "refined_sketch", "exact")}
    for engine, text in told.items():
        assert ("4096 numbers per row" in text) == (engine != "exact")
