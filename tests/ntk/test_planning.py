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
    assert (plan.engine, plan.n_samples, plan.n_outputs) == ("exact", 12, 3)
    assert sum(layer.n_weights for layer in plan.layers) == plan.n_parameters
    assert plan.seconds > 0
    lines = str(plan).splitlines()
    assert lines[0].startswith("exact, about ")
    assert any("4.weight" in line and "rule" in line for line in lines)


def test_plan_refuses_bad_settings() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    for settings_, message in (
        ({"engine": "magic"}, "engine must be one of"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"engine": "exact", "max_memory": 10}, "max_memory must be at least"),
        ({"engine": "sketch", "max_memory": 10}, "max_memory must be at least"),
        ({"engine": "refined_sketch", "max_memory": 10}, "max_memory must be at least"),
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
    with pytest.raises(ValueError, match='must all be one for the engine "sketch"'):
        plan_spectrum(faster, engine="sketch")


@pytest.mark.filterwarnings("ignore::optuna_ttp.ApproximationWarning")
@pytest.mark.parametrize("engine", ["auto", "exact", "sketch", "refined_sketch", "matrix_free"])
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
@pytest.mark.parametrize("engine", ["auto", "exact", "sketch", "matrix_free"])
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


@pytest.mark.parametrize("engine", ["sketch", "refined_sketch", "matrix_free"])
def test_plan_of_other_engines(engine: str) -> None:
    task = FineTuningTask(cnn(), images(12), validation_data=images(4, seed=2))
    plan = plan_spectrum(task, engine=engine)
    assert plan.engine == engine
    assert plan.seconds > 0
    assert plan.bytes > 0
    assert sum(layer.n_weights for layer in plan.layers) == plan.n_parameters
    assert str(plan).startswith(f"{engine}, about ")


def test_plan_of_products_one_direction_at_a_time() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 400))
    x = torch.randn(5, 6)
    task = FineTuningTask(model, (x, torch.arange(5)))
    plan = plan_spectrum(task, engine="matrix_free", rank=5)
    assert plan.seconds > 0
    # No rows are made, so there is nothing to say of single layers.
    assert plan.layers == ()
    assert plan.bytes > 4 * task.n_samples * task.n_outputs * 5
