"""Tests of the probabilities with which columns are picked."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import torch

from optuna_ttp.ntk.engines._importance import inclusion_factor
from optuna_ttp.ntk.engines._importance import probabilities
from optuna_ttp.ntk.engines._importance import systematic_sample


_scores = st.lists(
    st.floats(0.0, 1e6, allow_subnormal=False).map(lambda v: v if v > 1e-6 else 0.0),
    min_size=1,
    max_size=60,
)


@given(_scores, st.floats(0.5, 70.0))
@settings(max_examples=300, deadline=None)
def test_probabilities_sum_to_the_number_of_columns(scores: list[float], wanted: float) -> None:
    tensor = torch.tensor(scores, dtype=torch.float64)
    half = len(scores) // 2
    factor = inclusion_factor([tensor[:half], tensor[half:]], wanted)
    chosen = probabilities(tensor, factor)
    assert bool(((chosen >= 0) & (chosen <= 1)).all())
    assert bool((chosen[tensor == 0] == 0).all())
    n_positive = int((tensor > 0).sum())
    if n_positive <= wanted:
        assert math.isinf(factor)
        assert float(chosen.sum()) == n_positive
    else:
        assert abs(float(chosen.sum()) - wanted) <= 1e-6 * wanted


@given(_scores, st.floats(0.5, 70.0), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_a_sample_has_the_expected_size_and_all_certain_columns(
    scores: list[float], wanted: float, seed: int
) -> None:
    tensor = torch.tensor(scores, dtype=torch.float64)
    chances = probabilities(tensor, inclusion_factor([tensor], wanted))
    picked = systematic_sample(chances, torch.Generator().manual_seed(seed))
    assert len(set(picked.tolist())) == len(picked)
    assert abs(len(picked) - float(chances.sum())) < 1.0 + 1e-6
    assert set((chances >= 1.0).nonzero().flatten().tolist()) <= set(picked.tolist())


def test_each_column_is_picked_with_its_probability() -> None:
    chances = torch.tensor([0.05, 0.5, 1.0, 0.25, 0.2, 0.9], dtype=torch.float64)
    counts = np.zeros(len(chances))
    n = 4000
    for seed in range(n):
        counts[systematic_sample(chances, torch.Generator().manual_seed(seed)).numpy()] += 1
    np.testing.assert_allclose(counts / n, chances.numpy(), atol=0.03)
