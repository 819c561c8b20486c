from __future__ import annotations

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp.spectrum import measure_throughput
from optuna_ttp.spectrum import Throughput
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.cases import CASES
from tests.models import mlp
from tests.models import vectors


def test_interpolation_and_the_slope_beyond() -> None:
    throughput = Throughput(np.array([8, 32, 64]), np.array([1.0, 2.0, 4.0]), device="cpu")
    batch_sizes = [[1, 8, 20], [32, 48, 96]]
    expected = [[1.0, 1.0, 1.5], [2.0, 3.0, 6.0]]
    np.testing.assert_allclose(throughput.seconds_per_step(batch_sizes), expected)
    assert throughput.seconds_per_step(20).shape == ()
    one = Throughput(np.array([8]), np.array([3.0]), device="cpu")
    np.testing.assert_array_equal(one.seconds_per_step([1, 8, 1000]), [3.0, 3.0, 3.0])


@st.composite
def throughputs(draw: st.DrawFn) -> Throughput:
    batch_sizes = sorted(draw(st.sets(st.integers(1, 1000), min_size=1, max_size=6)))
    n = len(batch_sizes)
    seconds = sorted(draw(st.lists(st.floats(1e-6, 1e3), min_size=n, max_size=n)))
    return Throughput(np.array(batch_sizes), np.array(seconds), device="cpu")


@given(
    throughput=throughputs(), batch_sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=9)
)
def test_larger_batches_never_take_less_time(
    throughput: Throughput, batch_sizes: list[int]
) -> None:
    seconds = throughput.seconds_per_step(np.sort(batch_sizes))
    assert (seconds > 0).all()
    assert (np.diff(seconds) >= -1e-12 * seconds[:-1]).all()
    np.testing.assert_allclose(
        throughput.seconds_per_step(throughput.batch_sizes), throughput.seconds
    )


@pytest.mark.parametrize(
    ("batch_sizes", "seconds", "message"),
    [
        ([], [], "same length of at least one but got 0 and 0"),
        ([1, 2], [1.0], "same length of at least one but got 2 and 1"),
        ([2, 1], [1.0, 2.0], "batch_sizes must ascend"),
        ([2, 2], [1.0, 2.0], "batch_sizes must ascend"),
        ([1, 2], [2.0, 1.0], "seconds must not descend"),
        ([1, 2], [0.0, 1.0], "seconds must be finite and positive"),
        ([1, 2], [-1.0, 1.0], "seconds must be finite and positive"),
        ([1, 2], [1.0, np.nan], "seconds must be finite and positive"),
        ([1, 2], [1.0, np.inf], "seconds must be finite and positive"),
        ([0, 2], [1.0, 2.0], "batch_sizes must be positive"),
    ],
)
def test_bad_measurements_are_refused(
    batch_sizes: list[int], seconds: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Throughput(np.array(batch_sizes), np.array(seconds), device="cpu")


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_can_be_timed(name: str, device: torch.device) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    throughput = measure_throughput(
        task, device=device, batch_sizes=(2, 3, 500), seconds_per_batch_size=0.0
    )
    assert throughput.batch_sizes.tolist() == [2, 3, task.n_samples]
    assert (throughput.seconds > 0).all()
    assert throughput.device == str(device)


def test_steps_are_timed_in_training_mode_on_the_data_of_the_task() -> None:
    seen: list[tuple[bool, int]] = []
    x, _ = vectors(9)

    def forward(model: torch.nn.Module, inputs: torch.Tensor) -> Any:
        seen.append((model.training, len(inputs)))
        assert torch.equal(inputs, x[: len(inputs)])
        return model(inputs)

    task = FineTuningTask(mlp().eval(), vectors(9), forward=forward)
    seen.clear()
    measure_throughput(
        task, device=torch.device("cpu"), batch_sizes=(2, 4), seconds_per_batch_size=0.0
    )
    # A warm-up, and one step of each that takes longer than it need.
    assert seen == [(True, 2)] * 2 + [(True, 4)]


@pytest.mark.parametrize(
    ("seconds_per_batch_size", "batch_sizes"), [(1e-4, [2, 4]), (0.1, [2, 4, 6, 8])]
)
def test_long_steps_of_many_samples_are_not_made(
    seconds_per_batch_size: float, batch_sizes: list[int]
) -> None:
    def forward(model: torch.nn.Module, inputs: torch.Tensor) -> Any:
        time.sleep(0.01)
        return model(inputs)

    task = FineTuningTask(mlp().eval(), vectors(9), forward=forward)
    actual = measure_throughput(
        task,
        device=torch.device("cpu"),
        batch_sizes=(2, 4, 6, 8),
        seconds_per_batch_size=seconds_per_batch_size,
    )
    assert actual.batch_sizes.tolist() == batch_sizes


def test_short_steps_are_timed_again_and_again() -> None:
    seen: list[int] = []

    def forward(model: torch.nn.Module, inputs: torch.Tensor) -> Any:
        seen.append(len(inputs))
        return model(inputs)

    task = FineTuningTask(mlp().eval(), vectors(9), forward=forward)
    seen.clear()
    measure_throughput(
        task, device=torch.device("cpu"), batch_sizes=(2, 4), seconds_per_batch_size=60.0
    )
    # No more than fifty times, and a warm-up of both.
    assert seen == [2] * 51 + [4] * 51
