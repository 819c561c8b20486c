"""Kernels that are wrong are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optuna_ttp import JacobianMismatchError
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._registry import rule_for
from optuna_ttp.task import FineTuningTask
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU


def test_products_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_ttp.ntk.engines import _exact
    from optuna_ttp.ntk.jacobian import _state

    right = _state.multiply

    def wrong(*arguments: Any) -> Any:
        product, stretched = right(*arguments)
        return 1.02 * product, stretched

    monkeypatch.setattr(_exact, "multiply", wrong)
    with pytest.raises(JacobianMismatchError, match="their products are not"):
        exact_kernel(FineTuningTask(mlp(), vectors(6)), device=CPU)


def test_gradients_that_become_wrong_later_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples that claims were checked on say nothing of the others."""
    from optuna_ttp.ntk.jacobian import _find_claims

    right, n_calls = rule_for, [0]

    def late(module: torch.nn.Module) -> Any:
        rule = right(module)
        assert rule is not None

        def wrong(call: Any, cotangents: list[torch.Tensor]) -> Any:
            n_calls[0] += 1
            found = rule(call, cotangents)
            if n_calls[0] > 4 and call.state["weight"].shape == (16, 6):
                weight = found["weight"]
                assert isinstance(weight, Factors)
                found["weight"] = weight.scaled(1.5)
            return found

        return wrong

    monkeypatch.setattr(_find_claims, "rule_for", late)
    with pytest.raises(JacobianMismatchError, match=r"The gradient of '0\.weight' differs most"):
        exact_kernel(FineTuningTask(mlp(), vectors(12)), device=CPU)
