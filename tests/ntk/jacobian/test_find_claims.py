"""Networks that break other tools: the right module answers for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._registry import rule_for
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import CPU


class _Shared(torch.nn.Module):
    """A layer that runs twice, a tied pair, and a weight that is used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 6)
        self.tied = torch.nn.Linear(6, 6, bias=False)
        self.tied.weight = self.inner.weight
        self.functional = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.inner(x).tanh()).tanh()
        hidden = self.functional(self.tied(hidden)).tanh() @ self.functional.weight.T
        outputs: torch.Tensor = self.head(hidden.tanh())
        return outputs


class _TiedTable(torch.nn.Module):
    """A table that is also a projection, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 5)
        self.projection = torch.nn.Linear(5, 9, bias=False)
        self.projection.weight = self.table.weight
        self.head = torch.nn.Linear(9, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(
            self.projection(self.table(tokens).tanh()).tanh().mean(1)
        )
        return outputs


class _Positions(torch.nn.Module):
    """Position embeddings that all samples share, and a learned first token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(9, 6)
        self.positions = torch.nn.Embedding(8, 6)
        self.first = torch.nn.Parameter(torch.randn(1, 1, 6))
        self.project = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        where = torch.arange(tokens.shape[1])
        hidden = self.tokens(tokens) + self.project(self.positions(where))
        hidden = torch.cat([self.first.expand(len(tokens), -1, -1), hidden], 1)
        outputs: torch.Tensor = self.head(torch.tanh(hidden).mean(1))
        return outputs


class _OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        masked: torch.Tensor = gradient * (x > 0)
        return masked


class _CustomLayer(torch.nn.Module):
    """A weight of its own, an old-style function, and a look at the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 6) / 2)
        self.inner = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = _OldStyle.apply(x @ self.weight)  # type: ignore[no-untyped-call]
        if hidden.sum().item() > -1.0:
            hidden = hidden + 1.0
        outputs: torch.Tensor = self.head(self.inner(hidden).tanh())
        return outputs


class _Experts(torch.nn.Module):
    """Each sample goes through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0] > 0).long()
        hidden = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                hidden[chosen == k] = expert(x[chosen == k])
        outputs: torch.Tensor = self.head(hidden.tanh())
        return outputs


class _Recurrent(torch.nn.Module):
    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer = getattr(torch.nn, kind)(2, 4, batch_first=batch_first)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequence = x.reshape(len(x), 3, 2)
        if not self.batch_first:
            sequence = sequence.transpose(0, 1)
        hidden, _ = self.layer(sequence)
        outputs: torch.Tensor = self.head(hidden.select(1 if self.batch_first else 0, -1))
        return outputs


class _Overwriting(torch.nn.Module):
    """Layers whose outputs, and whose inputs, later operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.shift = _Shift()
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu_(self.first(x)) + 0.0
        shifted = self.shift(hidden)
        hidden.mul_(0.5)
        outputs: torch.Tensor = self.head((shifted + hidden).add_(1.0).tanh_())
        return outputs


class _Shift(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight * self.weight * torch.sign(x.detach() - 0.1)


class _TupleAndDictionary(torch.nn.Module):
    """Layers that take and give more than a tensor."""

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 6) / 2)

        def forward(self, x: torch.Tensor, *, options: dict[str, Any]) -> dict[str, Any]:
            hidden = x @ self.weight * options["scale"]
            return {"hidden": hidden, "pair": (hidden.tanh(), None), "n": 3}

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        found = self.inner(x, options={"scale": x.abs().mean(1, keepdim=True), "name": "inner"})
        return self.head((found["hidden"] * found["pair"][0]).tanh()), None


def _first(model: torch.nn.Module, x: Any) -> torch.Tensor:
    outputs: torch.Tensor = model(x)[0]
    return outputs


def _encoder_layer(batch_first: bool) -> torch.nn.Module:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first)
            self.head = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x[:, None] * torch.linspace(1, 2, 4)[:, None]
            if batch_first:
                outputs: torch.Tensor = self.head(self.layer(tokens).mean(1))
            else:
                outputs = self.head(self.layer(tokens.transpose(0, 1)).mean(0))
            return outputs

    return Model()


def _sdpa() -> torch.nn.Module:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(6, 18)
            self.head = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x[:, None] * torch.linspace(1, 2, 4)[:, None]
            q, k, v = self.project(tokens).chunk(3, -1)
            mixed = functional.scaled_dot_product_attention(q, k, v)
            outputs: torch.Tensor = self.head(mixed.mean(1))
            return outputs

    return Model()


def _low_rank() -> torch.nn.Module:
    """A frozen layer with a trainable low-rank correction (Hu et al., 2021, arXiv 2106.09685)."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(6, 6).requires_grad_(False)
            self.lora_a = torch.nn.Linear(6, 2, bias=False)
            self.lora_b = torch.nn.Linear(2, 6, bias=False)
            self.head = torch.nn.Linear(6, 3).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.base(x) + 2.0 * self.lora_b(self.lora_a(x))
            outputs: torch.Tensor = self.head(hidden.tanh())
            return outputs

    return Model()


def _tokens(n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(9, (n, 4)), torch.arange(n) % 3


HARD: dict[str, tuple[Callable[[], Case], dict[str, str]]] = {
    "shared, tied and functionally used": (
        lambda: Case(_Shared(), vectors(7)),
        {"inner.weight": "rule", "functional.weight": "vmap", "functional.bias": "rule"},
    ),
    "a table that is also a projection": (
        lambda: Case(_TiedTable(), _tokens()),
        {"table.weight": "rule"},
    ),
    "position embeddings": (
        lambda: Case(_Positions(), _tokens()),
        {"positions.weight": "rule", "project.weight": "rule", "first": "vmap"},
    ),
    "custom layer": (
        lambda: Case(_CustomLayer(), vectors(7)),
        {"weight": "loop", "inner.weight": "rule"},
    ),
    "experts": (lambda: Case(_Experts(), vectors(9)), {"experts.0.weight": "loop"}),
    "gru": (lambda: Case(_Recurrent("GRU", True), vectors(7)), {"layer.weight_hh_l0": "loop"}),
    "lstm": (lambda: Case(_Recurrent("LSTM", True), vectors(7)), {}),
    "rnn, time first": (
        lambda: Case(_Recurrent("RNN", False), vectors(7)),
        {"layer.weight_hh_l0": "loop"},
    ),
    "overwritten inputs": (lambda: Case(_Overwriting(), vectors(7)), {"shift.weight": "vmap"}),
    "tuples and dictionaries": (
        lambda: Case(_TupleAndDictionary(), vectors(7), _first),
        {"inner.weight": "vmap"},
    ),
    "encoder layer": (
        lambda: Case(_encoder_layer(True), vectors(7)),
        {"layer.linear1.weight": "rule", "layer.self_attn.out_proj.weight": "vmap"},
    ),
    "encoder layer, time first": (
        lambda: Case(_encoder_layer(False), vectors(7)),
        {"layer.self_attn.out_proj.weight": "vmap"},
    ),
    "attention kernels": (lambda: Case(_sdpa(), vectors(7)), {"project.weight": "rule"}),
    "low rank": (lambda: Case(_low_rank(), vectors(7)), {"lora_a.weight": "rule"}),
    "biases alone": (lambda: Case(_biases_alone(), images(7)), {"0.bias": "rule"}),
    "compiled layers": (
        lambda: Case(_compiled(), vectors(7)),
        {"0._orig_mod.0.weight": "rule", "2.weight": "rule"},
    ),
    "unused parameters": (
        lambda: Case(torch.nn.Sequential(mlp(), _Unused()), vectors(7)),
        {"0.0.weight": "rule"},
    ),
}


def _biases_alone() -> torch.nn.Module:
    """Only biases and shifts are trained (Ben Zaken et al., 2021, arXiv 2106.10199)."""
    model = cnn()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


def _compiled() -> torch.nn.Module:
    """A part of the network is compiled; the backend that only traces needs no compiler."""
    inner = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    compiled: Any = torch.compile(inner, backend="eager")
    return torch.nn.Sequential(compiled, torch.nn.Tanh(), torch.nn.Linear(6, 3))


class _Unused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("name", HARD)
def test_what_breaks_other_tools(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    make, derivatives = HARD[name]
    check_kernel(make(), device, derivatives=derivatives)


def test_a_rule_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rule_for(torch.nn.Linear(2, 2))
    assert right is not None

    def wrong(call: Any, cotangents: list[torch.Tensor]) -> Any:
        found = right(call, cotangents)
        weight = found["weight"]
        assert isinstance(weight, Factors)
        return {**found, "weight": weight.scaled(1.01)}

    monkeypatch.setattr("optuna_ttp.ntk.jacobian._find_claims.rule_for", lambda module: wrong)
    check_kernel(Case(mlp(), vectors(6)), derivatives={"0.weight": "vmap", "0.bias": "rule"})


class _Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 3)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(x)) * self.scale.exp()


def test_a_parameter_without_axes_is_one_weight() -> None:
    """As the logit scale of CLIP and the gates of ReZero are."""
    torch.manual_seed(0)
    model = _Scaled()
    x = torch.randn(6, 4)
    task = FineTuningTask(model, (x, torch.arange(6) % 3))
    gram = exact_kernel(task, device=CPU, dtype=torch.float64, show_progress_bar=False).gram
    model, rows = model.double(), []
    for output in model(x.double()).flatten():
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows)
    np.testing.assert_allclose(gram, (jacobian @ jacobian.T).numpy(), atol=1e-12)
