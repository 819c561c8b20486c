"""The rule of linear layers, alone and inside attention."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import torch

from tests.cases import Case
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import SEEDS
from tests.ntk.kernels import with_head


@given(seed=SEEDS, lead=st.lists(st.integers(1, 4), max_size=2), bias=st.booleans())
@settings(max_examples=15)
def test_linear_layers_on_any_axes(seed: int, lead: list[int], bias: bool) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(5, 4, bias=bias)
    check_kernel(
        with_head(layer, torch.randn(4, *lead, 5), -1), derivatives={"layer.weight": "rule"}
    )


@given(
    seed=SEEDS,
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
    check_kernel(one, derivatives={"attention.out_proj.weight": "vmap", "embed.weight": "rule"})
