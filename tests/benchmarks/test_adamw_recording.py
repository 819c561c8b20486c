"""The recording of runs with AdamW: its steps, its schedules, its files."""

from __future__ import annotations

from dataclasses import replace
import itertools
import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from benchmarks.accuracy.adamw import lora
from benchmarks.accuracy.adamw.configurations import configurations
from benchmarks.accuracy.adamw.recording import append
from benchmarks.accuracy.adamw.recording import Curve
from benchmarks.accuracy.adamw.recording import read
from benchmarks.accuracy.adamw.recording import record_missing
from benchmarks.accuracy.adamw.run import LoraRun
from benchmarks.accuracy.adamw.run import Run
from benchmarks.accuracy.adamw.training import evaluated_steps
from benchmarks.accuracy.adamw.training import train
from benchmarks.accuracy.tasks import Tuning
from benchmarks.accuracy.training import mini_batches


_RUN = Run(
    learning_rate=0.01,
    batch_size=4,
    beta_1=0.8,
    beta_2=0.99,
    weight_decay=0.1,
    eps=1e-6,
    schedule="linear",
    schedule_steps=25,
    warmup_steps=5,
    max_grad_norm=0.3,
    seed=3,
    max_steps=25,
)


def _tuning() -> Tuning:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (10,), generator=generator)
    model = torch.nn.Linear(12, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 12, generator=generator, dtype=torch.float64))
    return Tuning("linear", model.eval(), inputs, labels)


def _loss_and_gradient(
    w: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.int64]
) -> tuple[float, NDArray[np.float64]]:
    """Of a linear softmax model, in closed form."""
    outputs = x @ w.T
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    one_hot = np.eye(w.shape[0])[y]
    return float(-np.log((p * one_hot).sum(axis=1)).mean()), (p - one_hot).T @ x / len(x)


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_run_follows_the_formulas_of_adamw(schedule: Any, max_grad_norm: float | None) -> None:
    run = replace(_RUN, schedule=schedule, max_grad_norm=max_grad_norm)
    tuning = _tuning()
    x, y = tuning.inputs.numpy(), tuning.labels.numpy()
    w = tuning.model.weight.detach().numpy().copy()  # type: ignore[operator]
    curve = train(tuning.model, tuning, run, 1.0001)
    m, v = np.zeros_like(w), np.zeros_like(w)
    batches = mini_batches(10, run.batch_size, run.seed)
    for step, batch in enumerate(itertools.islice(batches, run.max_steps)):
        assert curve.full_losses[step] == pytest.approx(_loss_and_gradient(w, x, y)[0], rel=1e-9)
        loss, g = _loss_and_gradient(w, x[batch.numpy()], y[batch.numpy()])
        assert curve.batch_losses[step] == pytest.approx(loss, rel=1e-9)
        norm = float(np.linalg.norm(g))
        assert curve.gradient_norms[step] == pytest.approx(norm, rel=1e-9)
        if max_grad_norm is not None:
            g = g * min(1.0, max_grad_norm / (norm + 1e-6))
        rate = run.rate(step)
        w = w - rate * run.weight_decay * w
        m = run.beta_1 * m + (1 - run.beta_1) * g
        v = run.beta_2 * v + (1 - run.beta_2) * g**2
        m_hat = m / (1 - run.beta_1 ** (step + 1))
        v_hat = v / (1 - run.beta_2 ** (step + 1))
        w = w - rate * m_hat / (np.sqrt(v_hat) + run.eps)
    assert curve.end == "steps"
    assert curve.full_losses[-1] == pytest.approx(_loss_and_gradient(w, x, y)[0], rel=1e-9)


@given(st.integers(1, 60), st.integers(0, 60))
def test_the_schedule_is_that_of_transformers(schedule_steps: int, warmup_steps: int) -> None:
    run = replace(
        _RUN, schedule_steps=schedule_steps, warmup_steps=min(warmup_steps, schedule_steps)
    )
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimiser, run.warmup_steps, schedule_steps)
    for step in range(schedule_steps + 3):
        assert run.rate(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimiser.step()
        schedule.step()


@given(st.integers(1, 60), st.integers(1, 70))
def test_every_epoch_visits_every_sample_once(n_samples: int, batch_size: int) -> None:
    n_batches = math.ceil(n_samples / batch_size)
    batches = mini_batches(n_samples, batch_size, 0)
    first, second = (
        torch.cat(list(itertools.islice(batches, n_batches))).tolist() for _ in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(n_samples))


@given(st.integers(1, 2000), st.floats(1.01, 2.0))
def test_evaluations_lie_a_ratio_or_a_step_apart(max_steps: int, spacing: float) -> None:
    steps = evaluated_steps(max_steps, spacing)
    assert steps[0] == 0
    assert steps[-1] == max_steps
    for one, other in itertools.pairwise(steps):
        assert one < other <= max(one + 1, spacing * (one + 0.5) + 0.5)


def test_the_run_ends_at_the_deepest_loss() -> None:
    tuning = _tuning()
    run = replace(_RUN, learning_rate=0.1, weight_decay=0.0, schedule="constant", max_steps=500)
    curve = train(tuning.model, tuning, run, 1.1)
    assert curve.end == "loss"
    assert curve.full_losses[-1] <= 0.08 * curve.full_losses[0] < curve.full_losses[:-1].min()


@pytest.mark.parametrize(("rate", "weight_decay"), [(1e308, 0.0), (500.0, 0.01)])
def test_a_run_that_diverges_is_given_up(rate: float, weight_decay: float) -> None:
    tuning = _tuning()
    run = replace(
        _RUN,
        learning_rate=rate,
        weight_decay=weight_decay,
        schedule="constant",
        max_steps=1000,
    )
    curve = train(tuning.model, tuning, run, 1.1)
    assert curve.end == "diverged"
    assert len(curve.batch_losses) < 1000


def _curve(losses: list[float]) -> Curve:
    steps = np.arange(len(losses)).astype(np.float64) * 2
    return Curve(
        np.arange(2.0), np.array([1.0, math.nan]), steps, np.array(losses), steps, 1.5, "steps"
    )


def test_a_recording_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "runs.npz"
    adapted = LoraRun(**vars(_RUN), rank=8, alpha=16.0, rank_stabilised=True)
    curves = [_curve([2.0, 1.0, 0.5]), _curve([2.0, math.nan])]
    for run, curve in zip((_RUN, adapted), curves, strict=True):
        append(path, run, curve, {"name": "linear"})
    recording = read(path)
    assert recording.runs == [_RUN, adapted]
    assert recording.task == {"name": "linear"}
    for curve, before in zip(recording.curves, curves, strict=True):
        assert vars(curve).keys() == vars(before).keys()
        for key, value in vars(curve).items():
            np.testing.assert_array_equal(value, getattr(before, key))


def test_an_interrupted_recording_goes_on_where_it_stopped(tmp_path: Path) -> None:
    trained: list[float] = []

    def record(run: Run) -> Curve:
        trained.append(run.learning_rate)
        return _curve([2.0, 1.0])

    runs = [replace(_RUN, learning_rate=rate) for rate in (0.1, 0.2, 0.3)]
    record_missing(tmp_path / "runs.npz", runs[:2], record, {})
    record_missing(tmp_path / "runs.npz", runs, record, {})
    assert trained == [0.1, 0.2, 0.3]
    assert read(tmp_path / "runs.npz").runs == runs


def test_times_to_a_loss_are_exact_where_it_falls_exponentially() -> None:
    curve = _curve(np.exp(-0.3 * np.arange(0, 20, 2)).tolist())
    for fraction in (0.9, 0.5, 0.1):
        assert curve.steps_to(fraction) == pytest.approx(-math.log(fraction) / 0.3)
    assert curve.steps_to(1e-9) == math.inf


@pytest.mark.parametrize("name", ["efficientnet-digits-1", "minilm-0", "digits-0"])
def test_configurations_spread_over_the_range_of_rates(name: str) -> None:
    runs = configurations(name)
    assert runs == configurations(name)
    first = [run for run in runs if run.seed == 0]
    assert len(first) == 32
    assert {replace(run, seed=0) for run in runs} == set(first)
    gaps = np.diff(np.log10(sorted(run.learning_rate for run in first)))
    # One rate in each of 32 equal parts of at most 3.8 decades.
    assert gaps.max() <= 2 * 3.8 / 32
    assert {run.batch_size for run in first} == {8, 16, 32, 64}


def test_runs_of_adapters_spread_over_rates_batch_sizes_and_scalings() -> None:
    runs = lora.configurations()
    assert runs == lora.configurations()
    first = [run for run in runs if run.seed == 0]
    assert len(first) == 14
    assert {replace(run, seed=0) for run in runs} == set(first)
    gaps = np.diff(np.log10(sorted(run.learning_rate for run in first)))
    # One rate in each of 14 equal parts of two decades.
    assert gaps.max() <= 2 * 2 / 14
    assert {run.batch_size for run in first} == {8, 16}
    assert {(run.alpha, run.rank_stabilised) for run in first} == {
        (8.0, False),
        (16.0, False),
        (32.0, False),
        (8.0, True),
    }
