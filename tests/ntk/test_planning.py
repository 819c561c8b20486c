"""Plans: what is going to happen, and what it takes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk import resolve_engine
from optuna_ttp.task import FineTuningTask
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU


def test_plan_says_what_is_going_to_happen() -> None:
    plan = plan_spectrum(FineTuningTask(cnn(), images(12)))
    assert (plan.engine, plan.n_samples, plan.n_outputs) == ("columns", 12, 3)
    assert sum(layer.n_weights for layer in plan.layers) == plan.n_parameters == plan.n_columns
    # Outputs twice, the rows of all samples at once, and a forward and three backward passes.
    assert plan.n_passes == pytest.approx(2 + 2 + 4)
    lines = str(plan).splitlines()
    assert lines[0].startswith("columns, about 8 passes over the data")
    assert any("4.weight" in line and "rule" in line for line in lines)
    assert any("nothing is approximated" in line for line in lines)


def test_a_plan_has_the_columns_that_the_memory_allows() -> None:
    task = FineTuningTask(torch.nn.Linear(4_000, 3), (torch.randn(9, 4_000), torch.arange(9) % 3))
    assert plan_spectrum(task).n_columns == 12_003
    plan = plan_spectrum(task, max_memory=3 * 4 * 27 * 5_000)
    assert plan.n_columns == 5_000
    assert plan.bytes == 3 * 4 * 27 * 5_000
    assert "twice as many while predicted times are not accurate" in str(plan)
    with pytest.raises(ValueError, match=f"at least {plan.minimum_bytes} bytes"):
        plan_spectrum(task, engine="columns", max_memory=plan.minimum_bytes - 1)


@pytest.mark.parametrize("engine", ["columns", "exact", "matrix_free"])
def test_what_is_stored_is_as_large_as_planned(engine: str) -> None:
    task = FineTuningTask(cnn(), images(40), validation_data=images(10, seed=2))
    plan = plan_spectrum(task, engine=engine)
    spectrum = compute_spectrum(task, engine=engine, measure_speed=False, probe=False)
    assert len(spectrum.to_bytes()) == pytest.approx(plan.stored_bytes, rel=0.3)


def test_plan_refuses_bad_settings() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    for settings_, message in (
        ({"engine": "magic"}, "engine must be one of"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"engine": "exact", "max_memory": 10}, "max_memory must be at least"),
        ({"engine": "columns", "max_memory": 10}, "max_memory must be at least"),
        ({"engine": "matrix_free", "max_memory": 10}, "max_memory must be at least"),
        ({"max_memory": 10}, "max_memory must be at least"),
        ({"rank": 0}, "rank must be a positive integer but got 0"),
        ({"engine": "matrix_free", "rank": -1}, "rank must be a positive integer but got -1"),
        ({"rank": 2.5}, r"rank must be a positive integer but got 2\.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0 but got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_spectrum(task, **settings_)
    faster = FineTuningTask(mlp(), vectors(4), learning_rate_multipliers={"0.": 2.0})
    with pytest.raises(ValueError, match='must all be one for the engine "matrix_free"'):
        plan_spectrum(faster, engine="matrix_free")


@pytest.mark.filterwarnings("ignore::optuna_ttp.ApproximationWarning")
@pytest.mark.parametrize("engine", ["auto", "columns", "exact", "matrix_free"])
def test_what_a_refused_plan_asks_for_is_enough(engine: str) -> None:
    task = FineTuningTask(cnn(), images(12), validation_data=images(4, seed=2))
    for run in (plan_spectrum, compute_spectrum):
        with pytest.raises(ValueError, match=r"max_memory must be at least \d+ bytes") as caught:
            run(task, engine=engine, max_memory=10)
        found = re.search(r"at least (\d+) bytes", str(caught.value))
        assert found is not None
        minimum = int(found[1])
        with pytest.raises(ValueError, match=f"at least {minimum} bytes"):
            run(task, engine=engine, max_memory=minimum - 1)
        run(task, engine=engine, max_memory=minimum)


@pytest.mark.parametrize("run", [plan_spectrum, compute_spectrum, resolve_engine])
@pytest.mark.parametrize("engine", ["auto", "columns", "exact", "matrix_free"])
def test_memory_is_a_positive_number_of_bytes(run: Any, engine: str) -> None:
    task = FineTuningTask(mlp(), vectors(4))
    for no_number in ("4GiB", None, True):
        with pytest.raises(TypeError, match="max_memory must be a number of bytes but got"):
            run(task, engine=engine, max_memory=no_number)
    for too_little in (0, -5, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_memory must be a positive, finite number"):
            run(task, engine=engine, max_memory=too_little)
    with pytest.raises(TypeError, match="max_memory must be a number of bytes but got '4GiB'"):
        exact_kernel(task, device=CPU, max_memory="4GiB")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["columns", "exact", "matrix_free"])
def test_plan_of_other_engines(engine: str) -> None:
    task = FineTuningTask(cnn(), images(12), validation_data=images(4, seed=2))
    plan = plan_spectrum(task, engine=engine)
    assert plan.engine == engine
    assert plan.n_passes > 1
    assert plan.bytes > 0
    assert sum(layer.n_weights for layer in plan.layers) == plan.n_parameters
    assert str(plan).startswith(f"{engine}, about ")


def test_plan_of_products_one_direction_at_a_time() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 400))
    x = torch.randn(5, 6)
    task = FineTuningTask(model, (x, torch.arange(5)))
    plan = plan_spectrum(task, engine="matrix_free", rank=5)
    assert plan.n_passes > 1
    assert plan.bytes > 4 * task.n_samples * task.n_outputs * 5
