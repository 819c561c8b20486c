from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_ttp.dynamics import Target


def test_first_passage_interpolates_the_logarithm_of_a_loss() -> None:
    steps = np.array([0.0, 10.0, 20.0, 40.0])
    values = np.exp(-steps / 7)
    for step in (1, 9, 10, 11, 35, 40):
        target = Target("loss", math.exp(-step / 7))
        assert target.first_passage(steps, values) == step


def test_first_passage_interpolates_an_accuracy_linearly() -> None:
    target = Target("accuracy", 0.65)
    assert target.first_passage(np.array([0.0, 10.0]), np.array([0.5, 0.8])) == 5
    assert target.first_passage(np.array([0.0, 7.0]), np.array([0.5, 0.8])) == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 1.5, 1.2], math.inf),
        ([2.0, 1.5, 1.0], 2),
        ([0.5, 1.5, 1.0], 0),
        ([2.0, 0.5, 3.0], 1),
        ([2.0, 0.0, 0.0], 1),
        ([2.0, 1.5, math.nan], math.inf),
        ([2.0, math.nan, 0.5], 2),
        ([math.nan] * 3, math.inf),
        ([2.0, math.inf, 0.5], 2),
    ],
    ids=str,
)
def test_first_passage_of_special_curves(values: list[float], expected: float) -> None:
    step = Target("loss", 1.0).first_passage(np.arange(3.0), np.array(values))
    assert step == expected


@given(
    values=st.lists(st.floats(1e-3, 10), min_size=1, max_size=20),
    gaps=st.lists(st.integers(1, 9), min_size=20, max_size=20),
    goals=st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)),
)
def test_first_passage_is_a_whole_step_where_the_curve_crosses(
    values: list[float], gaps: list[int], goals: tuple[float, float]
) -> None:
    steps = np.concatenate([[0], np.cumsum(gaps)])[: len(values)].astype(float)
    curve = np.array(values)
    deep, shallow = (Target("loss", g).first_passage(steps, curve) for g in sorted(goals))
    assert shallow <= deep
    if min(values) > min(goals):
        assert deep == math.inf
        return
    assert deep == math.floor(deep)
    first = int(np.argmax(curve <= min(goals)))
    assert deep <= steps[first]
    assert first == 0 or deep > steps[first - 1]
