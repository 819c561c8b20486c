"""Tasks as a whole: settings, threads, modes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.models import mlp
from tests.models import vectors


@pytest.mark.parametrize(
    "model", [None, mlp, "mlp", torch.nn.Linear], ids=["none", "function", "name", "class"]
)
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module but got"):
        FineTuningTask(model, vectors())


def test_forward_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="forward must be callable"):
        FineTuningTask(mlp(), vectors(), forward="model(x)")  # type: ignore[arg-type]


def test_repr_and_sizes() -> None:
    task = FineTuningTask(case("frozen parameters").model, vectors(), name="mine")
    assert repr(task) == (
        "FineTuningTask(name='mine', n_samples=20, n_outputs=3, n_parameters=67, "
        "loss='cross_entropy')"
    )


@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
def test_threads_that_share_a_model_take_turns(engine: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(10, 3)
    )

    wrapped = torch.nn.Sequential(model)

    def computed(k: int) -> Any:
        task = FineTuningTask(wrapped if k % 2 else model, vectors(9))
        return compute_spectrum(task, engine=engine, device="cpu", measure_speed=False)

    alone = computed(0)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(computed, range(6)))
    for one in together:
        np.testing.assert_allclose(one.eigenvalues, alone.eigenvalues, rtol=1e-5)
    assert all(module.training for module in model.modules())
    assert len(list(model.parameters())) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_cross_entropy_of_one_output_is_refused() -> None:
    inputs = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"single output is always zero.*\(batch, 1\)"):
        FineTuningTask(torch.nn.Linear(6, 1), (inputs, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"explained_trace": "a"}, ValueError),
        ({"probe": "no"}, TypeError),
        ({"measure_speed": 3}, TypeError),
    ],
)
def test_settings_of_another_kind_are_refused(
    setting: dict[str, Any], error: type[Exception]
) -> None:
    task = FineTuningTask(torch.nn.Linear(6, 3), vectors(4))
    with pytest.raises(error, match=f"{next(iter(setting))} must be"):
        compute_spectrum(task, **setting)
