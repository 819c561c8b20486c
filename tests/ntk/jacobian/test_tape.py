"""Hooks on the user's model, with activations that are computed again."""

from __future__ import annotations

from collections.abc import Callable
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.task import FineTuningTask
from tests.models import cnn
from tests.models import images
from tests.models import vectors
from tests.ntk.kernels import CPU


class _Checkpointed(torch.nn.Module):
    """Layers that are computed again in the backward pass; the first one's input has no graph."""

    def __init__(self, *, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh())
        self.middle = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 3)
        self.use_reentrant = use_reentrant
        self.n_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self._run(self.body, x)
        outputs: torch.Tensor = self.head(self._run(self._count, hidden).tanh())
        return outputs

    def _count(self, hidden: torch.Tensor) -> torch.Tensor:
        self.n_calls += 1
        outputs: torch.Tensor = self.middle(hidden)
        return outputs

    def _run(self, function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return function(x)
        outputs: torch.Tensor = checkpoint(function, x, use_reentrant=self.use_reentrant)
        return outputs


@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_checkpointed_layers_are_those_of_a_plain_call(
    dtype: str, use_reentrant: bool, engine: str, device: torch.device
) -> None:
    def look(reentrant: bool | None) -> Any:
        task = FineTuningTask(_Checkpointed(use_reentrant=reentrant), vectors(9))
        found = compute_spectrum(task, engine=engine, dtype=dtype, device=device)
        assert found.throughput is not None
        assert found.probe is not None
        return found

    plain, checkpointed = look(None), look(use_reentrant)
    np.testing.assert_allclose(checkpointed.eigenvalues, plain.eigenvalues, rtol=1e-6)
    for name in ("relative_displacements", "kernel_ratios", "output_deviations"):
        np.testing.assert_allclose(
            getattr(checkpointed.probe, name), getattr(plain.probe, name), rtol=1e-4
        )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_are_computed_again_in_the_users_own_passes(use_reentrant: bool) -> None:
    model = _Checkpointed(use_reentrant=use_reentrant)
    x, _ = vectors(9)
    task = FineTuningTask(model, vectors(9))
    n_calls = []

    def train_in_the_meantime(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        other = _Checkpointed(use_reentrant=use_reentrant)
        thread = threading.Thread(
            target=lambda: torch.autograd.backward(other(x.float().requires_grad_()).sum())
        )
        thread.start()
        thread.join()
        n_calls.append(other.n_calls)
        outputs: torch.Tensor = model(x)
        return outputs

    exact_kernel(FineTuningTask(model, vectors(9), forward=train_in_the_meantime), device=CPU)
    assert set(n_calls) == {2}
    with task.frozen(CPU), pytest.raises(KeyboardInterrupt), task.frozen(CPU):
        raise KeyboardInterrupt
    model.n_calls = 0
    torch.autograd.backward(model(x.requires_grad_()).sum())
    assert model.n_calls == 2


def test_no_hook_stays_on_the_model() -> None:
    model = cnn()
    exact_kernel(FineTuningTask(model, images(6)), device=CPU)
    x, y = images(6)
    x[2] = float("1e38")
    with pytest.raises(ValueError, match="must be finite"):
        exact_kernel(FineTuningTask(model, (x, y)), device=CPU)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
