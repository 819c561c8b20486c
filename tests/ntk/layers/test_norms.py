"""The rules of normalisations."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import torch

from tests.cases import Case
from tests.models import cnn
from tests.models import images
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import SEEDS
from tests.ntk.kernels import with_head


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
    one = with_head(
        torch.nn.Sequential(torch.nn.Identity(), layer).eval(), torch.randn(5, *shape), axis
    )
    check_kernel(one, device, derivatives={"layer.1.weight": derivative})


@given(
    seed=SEEDS,
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
    one = with_head(torch.nn.Sequential(torch.nn.Identity(), layer).eval(), x, axis)
    check_kernel(one, derivatives={"layer.1.weight": "rule"})


def test_batch_norm_and_dropout_in_training_mode_are_evaluated() -> None:
    model = torch.nn.Sequential(cnn(), torch.nn.Dropout(0.5)).train()
    statistics = next(b for n, b in model.named_buffers() if "mean" in n)
    before = statistics.clone()
    check_kernel(Case(model, images(6)))
    assert model.training
    torch.testing.assert_close(statistics, before, rtol=0, atol=0)
