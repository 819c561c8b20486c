"""The exact engine on every kind of layer, against naive double precision."""

from __future__ import annotations

from collections.abc import Callable
import copy
import math
from pathlib import Path
import re
import subprocess
import sys
import threading
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch.utils.checkpoint import checkpoint

from optuna_ttp import JacobianMismatchError
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk import resolve_engine
from optuna_ttp.ntk.jacobian._separable import gathered_terms
from optuna_ttp.ntk.jacobian._separable import is_separable
from optuna_ttp.ntk.jacobian._separable import separate
from optuna_ttp.ntk.jacobian._separable import separated_gram
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._factors import ghost_gram
from optuna_ttp.ntk.layers._registry import rule_for
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.gradient_flow import follow_flow
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


CPU = torch.device("cpu")
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}
seeds = st.integers(0, 2**31)


def _check(
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


def _head(layer: torch.nn.Module, x: torch.Tensor, axis: int = 1) -> Case:
    with torch.no_grad():
        width = layer(x[:1]).shape[axis]
    return Case(_Head(layer, width, axis), (x, torch.arange(len(x)) % 3))


# Convolutions


@st.composite
def convolutions(draw: st.DrawFn, *, transposed: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(draw(seeds))
    n_axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    n_in = groups * draw(st.integers(1, 2))
    n_out = groups * draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n_axes))

    kernel, stride, dilation = sizes(1, 3), sizes(1, 2), sizes(1, 2)
    arguments: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        arguments["padding"] = tuple(draw(st.integers(0, k - 1)) for k in kernel)
        arguments["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        layer = getattr(torch.nn, f"ConvTranspose{n_axes}d")(n_in, n_out, **arguments)
        return layer, torch.randn(4, n_in, *sizes(5, 6))
    arguments["padding_mode"] = draw(
        st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"])
    )
    arguments["padding"] = sizes(0, 2)
    if arguments["padding_mode"] == "zeros" and draw(st.booleans()):
        arguments["padding"] = draw(st.sampled_from(["same", "valid"]))
        arguments["stride"] = 1
    layer = getattr(torch.nn, f"Conv{n_axes}d")(n_in, n_out, **arguments)
    return layer, torch.randn(4, n_in, *sizes(5, 6))


@given(problem=convolutions(transposed=False))
@settings(max_examples=40)
def test_convolutions(problem: tuple[torch.nn.Module, torch.Tensor]) -> None:
    _check(_head(*problem), derivatives={"layer.weight": "rule"})


@given(problem=convolutions(transposed=True))
@settings(max_examples=30)
def test_transposed_convolutions(problem: tuple[torch.nn.Module, torch.Tensor]) -> None:
    _check(_head(*problem), derivatives={"layer.weight": "rule"})


def test_depthwise_convolution(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 12, 3, padding=1, groups=6)
    _check(_head(layer, torch.randn(5, 6, 7, 7)), device, derivatives={"layer.weight": "rule"})


class _Prepared(torch.nn.Conv2d):
    """Does something to the inputs, the weight or the outputs of a convolution."""

    def __init__(self, what: str) -> None:
        super().__init__(4, 8, 3, stride=2, padding=1, groups=2)
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, padding = self.weight, 1
        if self.what == "uneven padding":
            x, padding = functional.pad(x, (0, 1, 1, 2)), 0
        if self.what == "standardised weight":
            weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        # By position and by name.
        y = functional.conv2d(x, weight, self.bias, (2, 2), padding=padding, groups=self.groups)
        if self.what == "twice":
            return y + functional.conv2d(x.flip(2), weight, self.bias, 2, 1, 1, self.groups)
        return 2.0 * y if self.what == "scaled outputs" else y


@pytest.mark.parametrize(
    ("what", "derivative"),
    [
        ("uneven padding", "rule"),
        ("nothing", "rule"),
        ("standardised weight", "vmap"),
        ("scaled outputs", "vmap"),
        ("twice", "vmap"),
    ],
)
def test_convolutions_with_a_forward_of_their_own(
    what: str, derivative: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    case = _head(_Prepared(what), torch.randn(5, 4, 7, 6))
    _check(case, device, derivatives={"layer.weight": derivative, "layer.bias": derivative})


# Linear layers, tables and norms


@given(seed=seeds, lead=st.lists(st.integers(1, 4), max_size=2), bias=st.booleans())
@settings(max_examples=15)
def test_linear_layers_on_any_axes(seed: int, lead: list[int], bias: bool) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(5, 4, bias=bias)
    _check(_head(layer, torch.randn(4, *lead, 5), -1), derivatives={"layer.weight": "rule"})


@given(seed=seeds, vocabulary=st.integers(2, 60), n_tokens=st.integers(1, 6), padded=st.booleans())
@settings(max_examples=15)
def test_embeddings(seed: int, vocabulary: int, n_tokens: int, padded: bool) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Embedding(vocabulary, 4, padding_idx=0 if padded else None)
    tokens = torch.randint(vocabulary, (5, n_tokens))
    tokens[0] = 1
    _check(_head(layer, tokens, -1), derivatives={"layer.weight": "rule"})


def _rms_norm_by_hand() -> torch.nn.Module:
    class RMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(6) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            scaled: torch.Tensor = self.weight * normalised
            return scaled

    return RMSNorm()


NORMS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], str]] = {
    "batch norm 1d": (lambda: torch.nn.BatchNorm1d(6), (6,), "rule"),
    "batch norm of a sequence": (lambda: torch.nn.BatchNorm1d(6), (6, 4), "rule"),
    "batch norm 2d": (lambda: torch.nn.BatchNorm2d(6), (6, 3, 3), "rule"),
    "batch norm 3d": (lambda: torch.nn.BatchNorm3d(6), (6, 2, 2, 2), "rule"),
    "layer norm": (lambda: torch.nn.LayerNorm(6), (4, 6), "rule"),
    "layer norm of two axes": (lambda: torch.nn.LayerNorm((4, 6)), (4, 6), "rule"),
    "layer norm of vectors": (lambda: torch.nn.LayerNorm(6), (6,), "rule"),
    "group norm": (lambda: torch.nn.GroupNorm(3, 6), (6, 3, 3), "rule"),
    "group norm of vectors": (lambda: torch.nn.GroupNorm(3, 6), (6,), "rule"),
    "instance norm": (lambda: torch.nn.InstanceNorm2d(6, affine=True), (6, 3, 3), "rule"),
    "rms norm": (lambda: torch.nn.RMSNorm(6), (4, 6), "rule"),
    "rms norm by hand": (_rms_norm_by_hand, (4, 6), "vmap"),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, device: torch.device) -> None:
    make, shape, derivative = NORMS[name]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
        layer(2.0 * torch.randn(32, *shape) + 1.0)
    axis = -1 if "layer" in name or "rms" in name else 1
    one = _head(
        torch.nn.Sequential(torch.nn.Identity(), layer).eval(), torch.randn(5, *shape), axis
    )
    _check(one, device, derivatives={"layer.1.weight": derivative})


@given(
    seed=seeds,
    kind=st.sampled_from(["batch", "group", "instance", "layer", "rms"]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    lead=st.lists(st.integers(1, 4), max_size=3),
    bias=st.booleans(),
)
@settings(max_examples=20)
def test_norms_of_any_shape(
    seed: int, kind: str, groups: int, per_group: int, lead: list[int], bias: bool
) -> None:
    torch.manual_seed(seed)
    width = groups * per_group
    if kind in ("layer", "rms"):
        # Statistics over one axis or two, none of them of a single number.
        shape = (width + 1,) if len(lead) % 2 else (2, width)
        layer: torch.nn.Module = (
            torch.nn.RMSNorm(shape)
            if kind == "rms"
            else torch.nn.LayerNorm(shape, bias=bias, eps=1e-3)
        )
        x, axis = torch.randn(5, *lead, *shape), -1
    else:
        # Instances of a single number have no variance.
        lead = [n + 1 for n in lead] or ([3] if kind == "instance" or per_group == 1 else [])
        n_axes, axis = len(lead), 1
        if kind == "group":
            layer = torch.nn.GroupNorm(groups, width)
        elif kind == "instance":
            layer = getattr(torch.nn, f"InstanceNorm{n_axes}d")(width, affine=True)
        else:
            layer = getattr(torch.nn, f"BatchNorm{max(1, n_axes)}d")(width, eps=1e-2)
        x = torch.randn(5, width, *lead)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
        layer(2.0 * torch.randn(16, *x.shape[1:]) + 1.0)
    one = _head(torch.nn.Sequential(torch.nn.Identity(), layer).eval(), x, axis)
    _check(one, derivatives={"layer.1.weight": "rule"})


@given(
    seed=seeds,
    heads=st.integers(1, 3),
    n_tokens=st.integers(1, 4),
    batch_first=st.booleans(),
    bias=st.booleans(),
    own_widths=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=10)
def test_attention_layers(
    seed: int,
    heads: int,
    n_tokens: int,
    batch_first: bool,
    bias: bool,
    own_widths: bool,
    masked: bool,
) -> None:
    torch.manual_seed(seed)
    width = 2 * heads

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Linear(3, width)
            widths = {"kdim": 3, "vdim": 3} if own_widths else {}
            self.attention = torch.nn.MultiheadAttention(
                width, heads, bias=bias, batch_first=batch_first, **widths
            )
            self.head = torch.nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = self.embed(x)
            key = x if own_widths else query
            if not batch_first:
                query, key = query.transpose(0, 1), key.transpose(0, 1)
            mask = torch.ones(n_tokens, n_tokens).triu(1).bool() if masked else None
            mixed, _ = self.attention(query, key, key, attn_mask=mask, need_weights=False)
            outputs: torch.Tensor = self.head(mixed.tanh().mean(1 if batch_first else 0))
            return outputs

    x = torch.randn(5, n_tokens, 3)
    one = Case(Model(), (x, torch.arange(5) % 3))
    _check(one, derivatives={"attention.out_proj.weight": "vmap", "embed.weight": "rule"})


def test_batch_norm_and_dropout_in_training_mode_are_evaluated() -> None:
    model = torch.nn.Sequential(cnn(), torch.nn.Dropout(0.5)).train()
    statistics = next(b for n, b in model.named_buffers() if "mean" in n)
    before = statistics.clone()
    _check(Case(model, images(6)))
    assert model.training
    torch.testing.assert_close(statistics, before, rtol=0, atol=0)


# The ways of a product


@st.composite
def factors(draw: st.DrawFn) -> tuple[Factors, Factors]:
    torch.manual_seed(draw(seeds))
    groups, classes, width, n_rows = (draw(st.integers(1, 4)) for _ in range(4))
    positions = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 2)))]
    transposed = draw(st.booleans())

    def make(n: int) -> Factors:
        def expand(x: torch.Tensor) -> torch.Tensor:
            return x

        return Factors(
            tuple(torch.randn(n, groups, n_rows, s, dtype=torch.float64) for s in positions),
            expand,
            tuple(
                torch.randn(n, groups, classes, width, s, dtype=torch.float64) for s in positions
            ),
            n_rows,
            transposed,
        )

    return make(draw(st.integers(1, 4))), make(draw(st.integers(1, 4)))


@given(pair=factors(), n_columns=st.integers(1, 40))
@settings(max_examples=60)
def test_rows_panels_and_ghost_products_agree(
    pair: tuple[Factors, Factors], n_columns: int
) -> None:
    left, right = pair
    rows = [f.rows().flatten(0, 1) for f in pair]
    expected = rows[0] @ rows[1].T
    panels = zip(left.panels(n_columns), right.panels(n_columns), strict=True)
    torch.testing.assert_close(sum(a @ b.T for a, b in panels), expected)
    torch.testing.assert_close(ghost_gram(left, right, symmetric=False), expected)
    square = ghost_gram(left, left, symmetric=True)
    # By samples, the lower triangle.
    samples = torch.arange(len(square)) // left.shape[1]
    lower = samples[:, None] >= samples
    torch.testing.assert_close(square[lower], (rows[0] @ rows[0].T)[lower])


@given(seed=seeds)
@settings(max_examples=20)
def test_products_of_tables_agree(seed: int) -> None:
    torch.manual_seed(seed)
    made = Factors(
        (torch.randint(7, (4, 5)),), None, (torch.randn(4, 1, 3, 6, 5, dtype=torch.float64),), 7
    )
    rows = made.rows().flatten(0, 1)
    torch.testing.assert_close(ghost_gram(made, made, symmetric=False), rows @ rows.T)
    weight = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(made.inner(weight), (rows @ weight.flatten()).reshape(4, 3))


@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 5), min_size=7, max_size=7),
    separable=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=60)
def test_separated_products_agree(
    seed: int, sizes: list[int], separable: tuple[bool, bool]
) -> None:
    torch.manual_seed(seed)
    n, m, groups, classes, width, positions, n_rows = sizes

    def make(n: int, easy: bool) -> Factors:
        def expand(x: torch.Tensor) -> torch.Tensor:
            return x

        weights = torch.randn(n, groups, classes, width, 1, dtype=torch.float64)
        # Some channels are active nowhere.
        pattern = torch.randn(n, groups, 1, width, positions, dtype=torch.float64).clamp(min=0.0)
        d = weights * pattern if easy else torch.randn((*weights.shape[:-1], positions)).double()
        x = torch.randn(n, groups, n_rows, positions, dtype=torch.float64)
        return Factors((x,), expand, (d,), n_rows)

    parts = [make(k, easy) for k, easy in zip((n, m), separable, strict=True)]
    rows = [f.rows().flatten(0, 1) for f in parts]
    made = [separate(f) for f in parts]
    if separable[0]:
        assert is_separable(parts[0])
        assert made[0].rows.shape[2] == 1
    torch.testing.assert_close(separated_gram(*made, symmetric=False), rows[0] @ rows[1].T)
    vectors = torch.randn(len(rows[0]), 2, dtype=torch.float64)
    torch.testing.assert_close(made[0].gradient().flatten(0, 1), rows[0])
    torch.testing.assert_close(made[0].product(vectors), rows[0].T @ vectors)
    torch.testing.assert_close(made[0].image(rows[0].T), rows[0] @ rows[0].T)
    both = gathered_terms(None, made[0], slice(0, n), n + m)
    both, all_rows = gathered_terms(both, made[1], slice(n, n + m), n + m), torch.cat(rows)
    square = separated_gram(both, both, symmetric=True)
    samples = torch.arange(len(square)) // classes
    lower = samples[:, None] >= samples
    torch.testing.assert_close(square[lower], (all_rows @ all_rows.T)[lower])


class _SometimesMixing(torch.nn.Module):
    """Behind the layer positions are pooled, and for some samples mixed first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 6)
        self.mixing = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.inner(x))
        mixed = (x[:, :1, :1] > 0.0) * torch.tanh(self.mixing(hidden))
        return hidden + mixed


def test_a_pattern_that_only_some_samples_have() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 6)
    x[:, 0, 0] = torch.cat([-torch.ones(8), torch.ones(4)])
    one = _head(_SometimesMixing(), x, -1)
    plan = plan_spectrum(FineTuningTask(one.model, one.data))
    method = {p.name: p.method for p in plan.layers}["layer.inner.weight"]
    assert method == "separable"
    _check(one)


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
    _check(Case(_Viewing(), (torch.randn(6, 2, 8, 8), torch.arange(6) % 3)))


@pytest.mark.parametrize("shape", [(40, 3), (3, 40)], ids=["wide", "narrow"])
def test_planner_takes_the_cheaper_product(shape: tuple[int, int]) -> None:
    width, n_tokens = shape
    torch.manual_seed(0)
    linear = [torch.nn.Linear(width, width) for _ in range(2)]
    layer = torch.nn.Sequential(linear[0], torch.nn.Tanh(), linear[1], torch.nn.Tanh())
    one = _head(layer, torch.randn(12, n_tokens, width), -1)
    plan = plan_spectrum(FineTuningTask(one.model, one.data))
    methods = {p.name: p.method for p in plan.layers}
    assert methods["layer.0.weight"] == ("ghost" if width > n_tokens else "rows")
    # Behind the second one tokens are only pooled.
    assert methods["layer.2.weight"] == "separable"
    _check(one)


# Half the memory


@pytest.mark.parametrize("name", ["cnn", "tokens", "table", "pooled"])
def test_a_jacobian_that_is_held_in_half_precision(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40))
    one = {
        "cnn": lambda: Case(cnn(), images(40)),
        "tokens": lambda: _head(wide, torch.randn(40, 3, 40), -1),
        "table": lambda: _head(torch.nn.Embedding(30, 8), torch.randint(30, (40, 4)), -1),
        "pooled": lambda: _head(torch.nn.Conv2d(2, 6, 3, groups=2), torch.randn(40, 2, 6, 6)),
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
    memory = [
        sum(p.bytes for p in plan_spectrum(task, dtype=d, engine="exact", device=device).layers)
        for d in ("float32", "bfloat16")
    ]
    assert memory[1] < 0.8 * memory[0]


def test_other_engines_hold_no_jacobian() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    for engine in ("sketch", "matrix_free"):
        with pytest.raises(ValueError, match='needs the engine "exact"'):
            compute_spectrum(task, dtype="bfloat16", engine=engine)


# What breaks other tools


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


class _SequenceFirst(torch.nn.Module):
    """Samples in the second axis of all layers, as in PyTorch's own tutorials."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 8)
        self.layer = layer
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        if isinstance(self.layer, torch.nn.MultiheadAttention):
            hidden = hidden + self.layer(hidden, hidden, hidden)[0]
        else:
            hidden = self.layer(hidden)
        outputs: torch.Tensor = self.head(hidden.mean(0))
        return outputs


_SEQUENCE_LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "attention": lambda: torch.nn.MultiheadAttention(8, 2),
    "layer": lambda: torch.nn.TransformerEncoderLayer(8, 2, 16),
    "encoder": lambda: torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
    ),
    "linear": lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()),
}


# As many tokens as are looked at first, as there are samples in a batch, and neither.
@pytest.mark.parametrize("n_tokens", [3, 4, 7])
@pytest.mark.parametrize("kind", _SEQUENCE_LAYERS)
def test_layers_whose_samples_lie_along_the_second_axis(
    kind: str, n_tokens: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    model = _SequenceFirst(_SEQUENCE_LAYERS[kind]())
    data = torch.randint(9, (7, n_tokens)), torch.arange(7) % 3
    _check(Case(model, data, lambda model, x: model(x.T)), device)


@pytest.mark.parametrize("n_tokens", [3, 5])
@pytest.mark.parametrize("engine", ["exact", "sketch", "matrix_free"])
def test_inputs_whose_samples_lie_along_the_second_axis_are_refused(
    engine: str, n_tokens: int
) -> None:
    def collate(items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([x for x, _ in items], 1), torch.tensor([y for _, y in items])

    torch.manual_seed(0)
    tokens = torch.randint(9, (7, n_tokens))
    items: Any = list(zip(tokens, [0, 1, 2, 0, 1, 2, 0], strict=True))
    loader: Any = torch.utils.data.DataLoader(items, 4, collate_fn=collate)
    task = FineTuningTask(_SequenceFirst(_SEQUENCE_LAYERS["layer"]()), loader)
    with pytest.raises(JacobianMismatchError, match="must lie along the first axis of all inputs"):
        compute_spectrum(task, engine=engine, device="cpu", measure_speed=False)


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
    _check(make(), device, derivatives=derivatives)


def test_inner_autocast_rounds_but_does_not_break() -> None:
    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs: torch.Tensor = model(x).float()
        return outputs

    one = Case(mlp(), vectors(7))
    jacobian = brute_force_jacobian(one)
    task = FineTuningTask(one.model, one.data, forward=forward)
    gram = exact_kernel(task, device=CPU).gram
    assert relative_error(gram, jacobian @ jacobian.T) < 0.03


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


@pytest.mark.parametrize("engine", ["exact", "refined_sketch", "matrix_free"])
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


def test_batches_of_different_lengths() -> None:
    """A collate function that pads to the longest sample of a batch."""
    torch.manual_seed(0)
    items = [(torch.randint(1, 9, (1 + n % 5,)), n % 3) for n in range(11)]

    def collate(batch: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence([t for t, _ in batch], batch_first=True)
        return tokens, torch.tensor([y for _, y in batch])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(9, 16, padding_idx=0)
            self.wide = torch.nn.Linear(16, 24, bias=False)
            self.head = torch.nn.Linear(24, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = (tokens != 0)[..., None]
            outputs: torch.Tensor = self.head((self.wide(self.table(tokens)) * mask).sum(1).tanh())
            return outputs

    model = Model()
    loader: Any = torch.utils.data.DataLoader
    task = FineTuningTask(model, loader(items, 4, collate_fn=collate))
    jacobian = brute_force_jacobian(Case(model, collate(items)))
    gram = exact_kernel(task, device=CPU, dtype=torch.float64).gram
    assert relative_error(gram, jacobian @ jacobian.T) < 1e-12


# Checks


def test_a_rule_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rule_for(torch.nn.Linear(2, 2))
    assert right is not None

    def wrong(call: Any, cotangents: list[torch.Tensor]) -> Any:
        found = right(call, cotangents)
        weight = found["weight"]
        assert isinstance(weight, Factors)
        return {**found, "weight": weight.scaled(1.01)}

    monkeypatch.setattr("optuna_ttp.ntk.jacobian._find_claims.rule_for", lambda module: wrong)
    _check(Case(mlp(), vectors(6)), derivatives={"0.weight": "vmap", "0.bias": "rule"})


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


_POINTWISE = """
import numpy as np
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.reference import brute_force_jacobian


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.down = torch.nn.Conv2d(4, 8, 1, stride=2, bias=False)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.stem(x).relu()
        {forward}
        return self.head(hidden.relu().mean((2, 3)))


torch.manual_seed(0)
data = torch.randn(24, 3, 16, 16), torch.arange(24) % 3
one = Case(Net(), data)
jacobian = brute_force_jacobian(one)
expected = np.linalg.eigvalsh(jacobian @ jacobian.T)[-5:][::-1]
spectrum = compute_spectrum(
    FineTuningTask(one.model, data), engine="{engine}", device="cpu", measure_speed=False
)
found = spectrum.eigenvalues[:5]
assert np.abs(found - expected).max() < 1e-4 * expected[0], (found, expected)
print("right")
"""


@pytest.mark.parametrize("engine", ["exact", "refined_sketch", "matrix_free"])
@pytest.mark.parametrize(
    "forward",
    [
        "hidden = self.down(hidden)",
        "hidden = torch.nn.functional.conv2d(hidden, self.down.weight, stride=2)",
    ],
    ids=["module", "function"],
)
def test_pointwise_convolutions_of_few_channels_with_a_stride(forward: str, engine: str) -> None:
    # In a process of its own, because PyTorch damages the memory where channels come last.
    done = subprocess.run(
        [sys.executable, "-c", _POINTWISE.format(forward=forward, engine=engine)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-2000:]


# Modules that write to what is the user's


class _Writing(torch.nn.Module):
    """A layer that writes to its inputs, its weights or its buffers whenever it runs."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.weight = torch.nn.Parameter(torch.randn(8, 6))
        self.vector: torch.Tensor
        self.register_buffer("vector", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        if self.what == "inputs":
            x.sub_(0.3).mul_(2.0)
        elif self.what == "weights":
            with torch.no_grad():
                weight.div_(weight.norm(dim=1, keepdim=True))
        elif self.what == "weight data":
            weight.data.clamp_(-1.0, 1.0)
        elif self.what == "new weight data":
            weight.data = weight.data / weight.data.norm(dim=1, keepdim=True)
        else:
            # A power iteration (Miyato et al., 2018, arXiv 1802.05957), in any mode.
            with torch.no_grad():
                other = functional.normalize(weight.T @ self.vector, dim=0)
                self.vector = functional.normalize(weight @ other, dim=0)
            weight = weight / (self.vector @ weight @ other)
        return functional.linear(x, weight)


@pytest.mark.parametrize("inner", [False, True], ids=["first", "inner"])
@pytest.mark.parametrize(
    "what", ["inputs", "weights", "weight data", "new weight data", "buffers"]
)
def test_modules_that_write_to_what_is_the_users(
    what: str, inner: bool, device: torch.device
) -> None:
    layers = [_Writing(what), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
    if inner:
        layers.insert(0, torch.nn.Linear(6, 6))
    data = vectors(7)
    model = torch.nn.Sequential(*layers)
    before = copy.deepcopy((model.state_dict(), data))
    jacobian = brute_force_jacobian(Case(copy.deepcopy(model), copy.deepcopy(data)))
    expected = jacobian @ jacobian.T
    task = FineTuningTask(model, data)
    for dtype, tolerance in DTYPES.items():
        kernel = exact_kernel(task, device=device, dtype=dtype)
        assert relative_error(kernel.gram, expected) < tolerance
    largest = np.linalg.eigvalsh(expected)[-1]
    for engine in ("exact", "sketch", "matrix_free"):
        spectrum = compute_spectrum(task, engine=engine, device=device)
        assert spectrum.eigenvalues[0] == pytest.approx(largest, rel=1e-4)
    torch.testing.assert_close((model.state_dict(), data), before, rtol=0, atol=0)


def test_weights_that_drift_are_refused() -> None:
    class Drifting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(0.99)
            return super().forward(x)

    model = Drifting(6, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="or write to its own weights"):
        FineTuningTask(model, vectors(7))
    assert torch.equal(model.weight, before)


# Interruption


class _Blocks:
    """A checkpoint that breaks off after some blocks."""

    def __init__(self) -> None:
        self.saved: dict[tuple[int, int], Any] = {}
        self.n_left = 10**6
        self.n_loaded = 0

    def save_block(self, key: tuple[int, int], arrays: list[Any]) -> None:
        if self.n_left == 0:
            raise KeyboardInterrupt
        self.n_left -= 1
        self.saved[key] = [a.copy() for a in arrays]

    def load_block(self, key: tuple[int, int]) -> list[Any] | None:
        self.n_loaded += key in self.saved
        return self.saved.get(key)


@pytest.mark.parametrize("multipliers", [None, {"0.": 3.0}], ids=["plain", "multipliers"])
def test_an_interrupted_kernel_goes_on_where_it_stopped(multipliers: Any) -> None:
    task = FineTuningTask(
        mlp(), vectors(14), validation_data=vectors(3), learning_rate_multipliers=multipliers
    )
    whole = exact_kernel(task, device=CPU)
    blocks = _Blocks()
    blocks.n_left = 9
    with pytest.raises(KeyboardInterrupt):
        exact_kernel(task, device=CPU, checkpoint=blocks)
    assert len(blocks.saved) == 9
    blocks.n_left = 10**6
    resumed = exact_kernel(task, device=CPU, checkpoint=blocks)
    assert blocks.n_loaded == 9
    for name in ("gram", "cross", "weight_outputs", "stretched"):
        expected = getattr(whole, name)
        if expected is not None:
            np.testing.assert_allclose(
                getattr(resumed, name), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
            )


# The plan


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


@pytest.mark.parametrize("engine", ["exact", "sketch", "matrix_free"])
@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_tables_that_renormalise_their_rows(layer: Any, engine: str) -> None:
    """They write to their weights whenever they run; the user's must stay as they are."""
    torch.manual_seed(0)
    table = layer(11, 6, max_norm=0.5)
    model = torch.nn.Sequential(table, torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.LazyLinear(3))
    data = torch.randint(11, (9, 7)), torch.arange(9) % 3
    with torch.no_grad():
        model(data[0][:1])
        # Far above the largest norm again.
        table.weight.normal_()
    before = {name: (p.clone(), p._version) for name, p in model.named_parameters()}
    task = FineTuningTask(model, data)
    fingerprint = task.fingerprint
    spectrum = compute_spectrum(task, engine=engine, show_progress_bar=False)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name][0], rtol=0, atol=0)
        assert p._version == before[name][1]
    assert task.fingerprint == fingerprint
    if layer is torch.nn.Embedding:
        claims = {p.name: p.derivative for p in plan_spectrum(task).layers}
        assert set(claims.values()) == {"rule"}
    # At the weights that the forward pass uses: it renormalises this copy.
    jacobian = brute_force_jacobian(Case(model, data))
    kernel = (spectrum.eigenvectors * spectrum.eigenvalues) @ spectrum.eigenvectors.T
    assert relative_error(kernel, jacobian @ jacobian.T) < 1e-5
    assert task.fingerprint == fingerprint
