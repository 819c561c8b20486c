"""The exact kernel against naive double precision, and networks of any one layer."""

from __future__ import annotations

import math

from hypothesis import strategies as st
import numpy as np
import torch

from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


CPU = torch.device("cpu")


DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}


SEEDS = st.integers(0, 2**31)


def check_kernel(
    one: Case,
    device: torch.device = CPU,
    *,
    derivatives: dict[str, str] | None = None,
    tolerances: dict[torch.dtype, float] | None = None,
) -> None:
    """The kernel in both precisions, and how the derivatives of some parameters were made."""
    jacobian = brute_force_jacobian(one)
    expected = jacobian @ jacobian.T
    assert np.linalg.norm(expected) > 0
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    for dtype, tolerance in (tolerances or DTYPES).items():
        kernel = exact_kernel(task, device=device, dtype=dtype, show_progress_bar=False)
        assert relative_error(kernel.gram, expected) < tolerance
        weights = torch.cat(
            [p.detach().flatten() for p in one.model.parameters() if p.requires_grad]
        )
        outputs = (jacobian @ weights.double().numpy()).reshape(kernel.weight_outputs.shape)
        scale = np.linalg.norm(jacobian) * float(weights.norm()) / math.sqrt(len(jacobian))
        assert np.abs(kernel.weight_outputs - outputs).max() < 10 * tolerance * scale
    if derivatives is not None:
        plan = plan_spectrum(task, device=device)
        made = {layer.name: layer.derivative for layer in plan.layers}
        assert {name: made[name] for name in derivatives} == derivatives


class _Head(torch.nn.Module):
    """Any layer, then a nonlinearity and a linear head on the means of its channels."""

    def __init__(self, layer: torch.nn.Module, width: int, axis: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.head = torch.nn.Linear(width, 3)
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(x)).movedim(self.axis, 1)
        hidden = hidden.reshape(*hidden.shape[:2], -1)
        outputs: torch.Tensor = self.head((hidden * torch.linspace(1, 2, hidden.shape[2])).mean(2))
        return outputs


def with_head(layer: torch.nn.Module, x: torch.Tensor, axis: int = 1) -> Case:
    with torch.no_grad():
        width = layer(x[:1]).shape[axis]
    return Case(_Head(layer, width, axis), (x, torch.arange(len(x)) % 3))
