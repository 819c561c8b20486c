"""How each part of the Jacobian is held, and in which precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.gradient_flow import follow_flow
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import with_head
from tests.reference import relative_error


class _Viewing(torch.nn.Module):
    """Counts on the layout of a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(2, 4, 3)
        self.head = torch.nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(torch.tanh(self.convolution(x)).view(len(x), -1))
        return outputs


def test_a_model_that_counts_on_the_layout_of_activations() -> None:
    torch.manual_seed(0)
    check_kernel(Case(_Viewing(), (torch.randn(6, 2, 8, 8), torch.arange(6) % 3)))


@pytest.mark.parametrize("shape", [(40, 3), (3, 40)], ids=["wide", "narrow"])
def test_planner_takes_the_cheaper_product(shape: tuple[int, int]) -> None:
    width, n_tokens = shape
    torch.manual_seed(0)
    linear = [torch.nn.Linear(width, width) for _ in range(2)]
    layer = torch.nn.Sequential(linear[0], torch.nn.Tanh(), linear[1], torch.nn.Tanh())
    one = with_head(layer, torch.randn(12, n_tokens, width), -1)
    plan = plan_spectrum(FineTuningTask(one.model, one.data), engine="exact")
    methods = {p.name: p.method for p in plan.layers}
    assert methods["layer.0.weight"] == ("ghost" if width > n_tokens else "rows")
    # Behind the second one tokens are only pooled.
    assert methods["layer.2.weight"] == "separable"
    check_kernel(one)


@pytest.mark.parametrize("name", ["cnn", "tokens", "table", "pooled"])
def test_a_jacobian_that_is_held_in_half_precision(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40))
    one = {
        "cnn": lambda: Case(cnn(), images(40)),
        "tokens": lambda: with_head(wide, torch.randn(40, 3, 40), -1),
        "table": lambda: with_head(torch.nn.Embedding(30, 8), torch.randint(30, (40, 4)), -1),
        "pooled": lambda: with_head(torch.nn.Conv2d(2, 6, 3, groups=2), torch.randn(40, 2, 6, 6)),
    }[name]()
    task = FineTuningTask(one.model, one.data)
    whole = exact_kernel(task, device=device, show_progress_bar=False)
    half = exact_kernel(task, device=device, show_progress_bar=False, held=torch.bfloat16)
    # An entry is rounded by at most a 256th, up as often as down.
    assert 1e-6 < relative_error(half.gram, whole.gram) < 4e-3
    assert relative_error(half.weight_outputs, whole.weight_outputs) < 1e-2
    settings_: dict[str, Any] = {
        "measure_speed": False,
        "probe": False,
        "device": device,
        "engine": "exact",
    }
    spectra = [compute_spectrum(task, dtype=d, **settings_) for d in ("float32", "bfloat16")]
    assert spectra[1].metadata.dtype == "bfloat16"
    # What it is for: predicted times within 1 %.
    times = [follow_flow(s).times for s in spectra]
    assert np.isfinite(times[0]).any()
    reached = np.isfinite(times[0])
    assert np.abs(times[1][reached] / times[0][reached] - 1.0).max() < 0.01
    memory = []
    for held in (None, torch.bfloat16):
        settings = EngineSettings(torch.device("cpu"), held=held)
        with task.frozen(settings.device, settings.dtype) as frozen:
            memory.append(prepare(task, frozen, settings).layout.bytes_per_sample)
    assert memory[1] < 0.8 * memory[0]


def test_other_engines_hold_no_jacobian() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    for engine in ("columns", "matrix_free"):
        with pytest.raises(ValueError, match='needs the engine "exact"'):
            compute_spectrum(task, dtype="bfloat16", engine=engine)
