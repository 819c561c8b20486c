"""Blocks of the kernel that are stored while it is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.task import FineTuningTask
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU
from tests.reference import relative_error


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


class _SameBlock:
    """Gives the same for every block."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def save_block(self, key: tuple[int, int], arrays: list[NDArray[Any]]) -> None:
        """Forget it."""

    def load_block(self, key: tuple[int, int]) -> Any:
        return self._block


_OF_OTHER_TYPES: dict[str, tuple[Any, str]] = {
    "text": (["a"], "str"),
    "number": (3, "int"),
    "no list": (np.zeros((3, 3)), "float64"),
    "array of text": ([np.full((3, 3), "a"), np.zeros((1, 3))], "<U1, float64"),
    "tensors": ([torch.zeros(3, 3), torch.zeros(1, 3)], "Tensor, Tensor"),
    "complex": ([np.zeros((3, 3), complex), np.zeros((1, 3))], "complex128, float64"),
    "objects": ([np.full((3, 3), None), np.zeros((1, 3))], "object, float64"),
}


@pytest.mark.parametrize("name", _OF_OTHER_TYPES)
def test_what_a_checkpoint_returns_must_be_arrays(name: str) -> None:
    block, kinds = _OF_OTHER_TYPES[name]
    task = FineTuningTask(mlp(), vectors(6))
    with pytest.raises(TypeError, match=f"load_block must return the list .* but got {kinds} for"):
        exact_kernel(task, device=CPU, checkpoint=_SameBlock(block))


@pytest.mark.parametrize(
    "block",
    [
        [],
        [np.zeros((3, 3)), np.zeros((1, 2))],
        [np.zeros((2, 3)), np.zeros((1, 3))],
        [np.full((3, 3), np.nan), np.zeros((1, 3))],
        [np.zeros((3, 3)), np.zeros((1, 3)), np.zeros(2)],
    ],
    ids=["none", "outputs", "shape", "not finite", "more"],
)
def test_blocks_of_a_checkpoint_that_do_not_fit_are_computed_again(block: Any) -> None:
    task = FineTuningTask(mlp(), vectors(6))
    kernel = exact_kernel(task, device=CPU, checkpoint=_SameBlock(block))
    assert relative_error(kernel.gram, exact_kernel(task, device=CPU).gram) < 1e-5


@pytest.mark.parametrize("checkpoint", [3, "a", [], _SameBlock], ids=["3", "a", "list", "class"])
def test_a_checkpoint_that_is_none_is_refused(checkpoint: Any) -> None:
    task = FineTuningTask(mlp(), vectors(6))
    for run in (
        lambda: compute_spectrum(task, engine="exact", checkpoint=checkpoint),
        lambda: exact_kernel(task, device=CPU, checkpoint=checkpoint),
    ):
        with pytest.raises(TypeError, match="checkpoint must be an object with the methods"):
            run()
