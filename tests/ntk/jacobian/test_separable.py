"""Gradients behind which only channels are weighted and positions are pooled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import torch

from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk.jacobian._separable import gathered_terms
from optuna_ttp.ntk.jacobian._separable import is_separable
from optuna_ttp.ntk.jacobian._separable import separate
from optuna_ttp.ntk.jacobian._separable import separated_gram
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.task import FineTuningTask
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import SEEDS
from tests.ntk.kernels import with_head


@given(
    seed=SEEDS,
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
    one = with_head(_SometimesMixing(), x, -1)
    plan = plan_spectrum(FineTuningTask(one.model, one.data), engine="exact")
    method = {p.name: p.method for p in plan.layers}["layer.inner.weight"]
    assert method == "separable"
    check_kernel(one)
