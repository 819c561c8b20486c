"""The ways of a product of factors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import torch

from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._factors import ghost_gram
from tests.ntk.kernels import SEEDS


@st.composite
def factors(draw: st.DrawFn) -> tuple[Factors, Factors]:
    torch.manual_seed(draw(SEEDS))
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


@given(seed=SEEDS)
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
