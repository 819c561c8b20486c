"""The rules of convolutions."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as functional

from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import SEEDS
from tests.ntk.kernels import with_head


@st.composite
def convolutions(draw: st.DrawFn, *, transposed: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(draw(SEEDS))
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
    check_kernel(with_head(*problem), derivatives={"layer.weight": "rule"})


@given(problem=convolutions(transposed=True))
@settings(max_examples=30)
def test_transposed_convolutions(problem: tuple[torch.nn.Module, torch.Tensor]) -> None:
    check_kernel(with_head(*problem), derivatives={"layer.weight": "rule"})


def test_depthwise_convolution(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 12, 3, padding=1, groups=6)
    check_kernel(
        with_head(layer, torch.randn(5, 6, 7, 7)), device, derivatives={"layer.weight": "rule"}
    )


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
    case = with_head(_Prepared(what), torch.randn(5, 4, 7, 6))
    check_kernel(case, device, derivatives={"layer.weight": derivative, "layer.bias": derivative})


_POINTWISE = """
import numpy as np
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.reference import brute_force_jacobian


class Net(torch.nn.Module):
    def __init__(self, as_module):
        super().__init__()
        self.as_module = as_module
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.down = torch.nn.Conv2d(4, 8, 1, stride=2, bias=False)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.stem(x).relu()
        if self.as_module:
            hidden = self.down(hidden)
        else:
            hidden = torch.nn.functional.conv2d(hidden, self.down.weight, stride=2)
        return self.head(hidden.relu().mean((2, 3)))


torch.manual_seed(0)
data = torch.randn(24, 3, 16, 16), torch.arange(24) % 3
for as_module in (True, False):
    one = Case(Net(as_module), data)
    jacobian = brute_force_jacobian(one)
    expected = np.linalg.eigvalsh(jacobian @ jacobian.T)[-5:][::-1]
    for engine in ("exact", "columns", "matrix_free"):
        spectrum = compute_spectrum(
            FineTuningTask(one.model, data), engine=engine, device="cpu", measure_speed=False
        )
        found = spectrum.eigenvalues[:5]
        assert np.abs(found - expected).max() < 1e-4 * expected[0], (found, expected)
        print(as_module, engine)
"""


def test_pointwise_convolutions_of_few_channels_with_a_stride() -> None:
    # In a process of its own, because PyTorch damages the memory where channels come last.
    done = subprocess.run(
        [sys.executable, "-c", _POINTWISE],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    engines = ("exact", "columns", "matrix_free")
    right = [f"{as_module} {engine}" for as_module in (True, False) for engine in engines]
    assert (done.returncode, done.stdout.splitlines()) == (0, right), done.stderr[-2000:]
