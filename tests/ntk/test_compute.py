"""From a task to its spectrum, by every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


def test_a_layer_under_two_names_stays_the_users() -> None:
    """torch.func.functional_call leaves other tensors in the place of its parameters."""
    one = case("a layer under two names")
    names = one.model.named_parameters(remove_duplicate=False)
    before = {name: (id(p), p.detach().clone()) for name, p in names}
    task = FineTuningTask(one.model, one.data)
    for engine in ("exact", "columns", "matrix_free"):
        compute_spectrum(task, engine=engine, show_progress_bar=False)
    after = dict(one.model.named_parameters(remove_duplicate=False))
    assert set(after) == set(before)
    for name, parameter in after.items():
        assert isinstance(parameter, torch.nn.Parameter)
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
def test_seeds(engine: str) -> None:
    task = FineTuningTask(mlp(), vectors(5))
    settings: dict[str, Any] = {"engine": engine, "measure_speed": False, "probe": False}
    numbers: list[Any] = [2**62 - 1, np.int64(3)]
    for seed in numbers:
        assert compute_spectrum(task, seed=seed, **settings).rank == 15
    for seed in (2**62, 2**64, 2**80):
        with pytest.raises(ValueError, match=r"seed must be less than 2\*\*62 but got"):
            compute_spectrum(task, seed=seed, **settings)
        with pytest.raises(ValueError, match=r"seed must be less than 2\*\*62 but got"):
            plan_spectrum(task, engine=engine, seed=seed)
    for run in (
        lambda: compute_spectrum(task, seed=-1, **settings),
        lambda: plan_spectrum(task, engine=engine, seed=-1),
        lambda: exact_kernel(task, device=CPU, seed=-1),
        lambda: task.subset(2, seed=-1),
    ):
        with pytest.raises(ValueError, match="seed must be a whole number of at least 0 but got"):
            run()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
def test_an_enclosing_autocast_changes_nothing(
    engine: str, dtype: str, device: torch.device
) -> None:
    task = FineTuningTask(cnn(), images(12), validation_data=images(5, seed=2))
    settings: dict[str, Any] = {"engine": engine, "dtype": dtype, "device": device}
    expected = compute_spectrum(task, measure_speed=False, **settings)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast(device.type, torch.bfloat16):
        found = compute_spectrum(task, measure_speed=False, **settings)
        kernel = exact_kernel(task, device=device)
        assert plan_spectrum(task, engine=engine, dtype=dtype, device=device).engine == engine
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-5)
    np.testing.assert_allclose(found.initial_outputs, expected.initial_outputs, rtol=1e-5)
    assert relative_error(kernel.gram, exact_kernel(task, device=device).gram) < 1e-6
    assert found.probe is not None
    assert expected.probe is not None
    for name, array in vars(expected.probe).items():
        np.testing.assert_allclose(vars(found.probe)[name], array, rtol=1e-3, atol=1e-5)


def test_spectrum_of_a_task(device: torch.device) -> None:
    one = case("mlp")
    task = FineTuningTask(one.model, one.data, name="mine")
    spectrum = compute_spectrum(task, dtype="float64", device=device)
    jacobian = brute_force_jacobian(one)
    expected = np.linalg.eigvalsh(jacobian @ jacobian.T)[::-1]
    np.testing.assert_allclose(spectrum.eigenvalues, expected[: spectrum.rank], rtol=1e-8)
    assert spectrum.trace == pytest.approx(expected.sum(), rel=1e-10)
    assert spectrum.throughput is not None
    assert spectrum.throughput.batch_sizes.tolist() == [2, 8]
    metadata = spectrum.metadata
    assert metadata.fingerprint == task.fingerprint
    assert (metadata.name, metadata.engine, metadata.dtype) == ("mine", "columns", "float64")
    assert torch.device(metadata.device) == device
    assert metadata.n_parameters == 163
    assert metadata.compute_seconds > 0


def test_spectrum_keeps_the_precision_that_was_asked_for() -> None:
    task = FineTuningTask(mlp(), vectors(5))
    single = compute_spectrum(task, measure_speed=False)
    assert single.eigenvectors.dtype == np.float32
    assert single.throughput is None
    assert single.metadata.dtype == "float32"
    double = compute_spectrum(task, measure_speed=False, dtype="float64")
    assert double.eigenvectors.dtype == np.float64


def test_spectrum_is_where_the_model_is_by_default() -> None:
    spectrum = compute_spectrum(FineTuningTask(mlp(), vectors(4)), measure_speed=False)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.device(spectrum.metadata.device).type == expected


def test_double_precision_model_gives_a_single_precision_spectrum_when_asked() -> None:
    x, y = vectors(4)
    single = compute_spectrum(FineTuningTask(mlp(), (x, y)), measure_speed=False)
    double = compute_spectrum(FineTuningTask(mlp().double(), (x.double(), y)), measure_speed=False)
    np.testing.assert_allclose(single.eigenvalues, double.eigenvalues, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "magic"}, 'engine must be one of "auto", "exact".* but got \'magic\''),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"dtype": torch.float32}, "dtype must be one of"),
        ({"rank": 0}, "rank must be a positive integer but got 0"),
        ({"rank": 1.5}, r"rank must be a positive integer but got 1\.5"),
        ({"rank": True}, "rank must be a positive integer but got True"),
        ({"rank": float("inf")}, "rank must be a positive integer but got inf"),
        ({"explained_trace": 0.0}, r"explained_trace must be in \(0, 1\]"),
        ({"explained_trace": 1.5}, r"explained_trace must be in \(0, 1\]"),
        ({"explained_trace": float("nan")}, r"explained_trace must be in \(0, 1\]"),
        ({"device": "abacus"}, "device must be one that torch can use here but got 'abacus'"),
        ({"device": "cuda:99"}, "device must be one that torch can use here but got 'cuda:99'"),
        ({"max_memory": 100}, "max_memory must be at least"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_spectrum(FineTuningTask(mlp(), vectors(4)), **settings)


@pytest.mark.parametrize("task", [None, "task", torch.nn.Linear(3, 2)])
def test_what_is_no_task_is_refused(task: Any) -> None:
    with pytest.raises(TypeError, match="task must be a FineTuningTask but got"):
        compute_spectrum(task)
