from __future__ import annotations

from dataclasses import replace
from functools import cache
import math
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Target
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import linear_task
from tests.cases import spectrum
from tests.models import mlp
from tests.models import separated


def _spectrum(task: FineTuningTask) -> Spectrum:
    return compute_spectrum(task, dtype="float64", measure_speed=False, device="cpu", probe=False)


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


# Subsets of a task


def test_subset_is_the_task_of_some_of_its_samples() -> None:
    task = linear_task(n_samples=20)
    part = task.subset(8, seed=3)
    assert part.n_samples == 8
    assert (part.n_outputs, part.n_parameters, part.name) == (3, 21, "Linear")
    assert part.model is task.model
    x, y = task._dataset.tensors
    (inputs, targets), *more = part.batches(20, torch.device("cpu"), torch.float64)
    assert more == []
    rows = [int((x == row).all(dim=1).nonzero()[0]) for row in inputs]
    assert len(set(rows)) == 8
    np.testing.assert_array_equal(targets, y[rows])
    np.testing.assert_array_equal(part.targets, y[rows])
    same = FineTuningTask(task.model, (x[rows], y[rows]))
    np.testing.assert_array_equal(_spectrum(part).eigenvalues, _spectrum(same).eigenvalues)
    # The task itself is as it was.
    assert (task.n_samples, len(task.targets)) == (20, 20)
    assert task.fingerprint == linear_task(n_samples=20).fingerprint


@given(counts=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_subsets_of_a_seed_are_nested(counts: tuple[int, int], seed: int) -> None:
    task = _task_of_numbers()
    small, large = (_numbers(task.subset(n, seed=seed)) for n in sorted(counts))
    assert (len(small), len(large)) == tuple(sorted(counts))
    assert set(small) <= set(large)
    assert sorted(small) == small
    assert _numbers(task.subset(counts[0], seed=seed)) == (
        small if counts[0] == len(small) else large
    )


@cache
def _task_of_numbers() -> FineTuningTask:
    x = torch.arange(20.0)[:, None].repeat(1, 6)
    return FineTuningTask(mlp(), (x, torch.arange(20) % 3))


def _numbers(task: FineTuningTask) -> list[int]:
    (inputs, _), *_ = task.batches(20, torch.device("cpu"), torch.float32)
    return [int(row[0]) for row in inputs]


def test_seeds_draw_different_subsets() -> None:
    task = _task_of_numbers()
    assert len({tuple(_numbers(task.subset(10, seed=seed))) for seed in range(5)}) == 5


def test_subset_of_all_samples_is_the_same_task() -> None:
    task = linear_task()
    assert task.subset(12).fingerprint == task.fingerprint
    prints = {task.subset(n, seed=seed).fingerprint for n in (5, 6) for seed in (0, 1)}
    assert len(prints) == 4


def test_subset_of_a_subset_and_of_a_loader() -> None:
    x, y = torch.arange(20.0)[:, None].repeat(1, 6), torch.arange(20) % 3
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=7, sampler=list(range(19, 4, -1))
    )
    numbers = _numbers(FineTuningTask(mlp(), loader).subset(6))
    assert len(set(numbers)) == 6
    assert min(numbers) > 4
    again = _numbers(FineTuningTask(mlp(), loader).subset(6).subset(4))
    assert set(again) < set(numbers)


def test_subset_keeps_validation_data_and_multipliers() -> None:
    task = linear_task()
    x, y = task._dataset.tensors
    whole = FineTuningTask(
        task.model, (x, y), validation_data=(x[:5], y[:5]), learning_rate_multipliers={"bias": 9.0}
    )
    part = whole.subset(6)
    assert part.multipliers == {"weight": 1.0, "bias": 9.0}
    validation = _spectrum(part).validation
    assert validation is not None
    assert validation.initial_outputs.shape == (5, 3)


@pytest.mark.parametrize("n_samples", [0, -1, 13, 10**9, 2.5, math.nan, math.inf, True], ids=str)
def test_bad_subsets_are_refused(n_samples: Any) -> None:
    with pytest.raises(ValueError, match=r"n_samples must be from 1 to 12, .* but got"):
        linear_task().subset(n_samples)


# Predictions for more samples


def test_number_of_samples_of_the_spectrum_changes_nothing() -> None:
    configurations = ([0.01, 0.05, 5.0], [4, 12, 3], 0.5)
    plain, same = (
        TrainingTimePredictor(_linear(), target_fraction=0.6, n_samples=n).predict(*configurations)
        for n in (None, 12)
    )
    for name in ("steps", "steps_low", "steps_high", "epochs", "stability", "p_converges"):
        np.testing.assert_array_equal(getattr(same, name), getattr(plain, name), err_msg=name)
    np.testing.assert_array_equal(same.curve_losses, plain.curve_losses)


@pytest.mark.parametrize("n_samples", [0, -3, 2.5, math.nan, math.inf, True], ids=str)
def test_bad_number_of_samples_is_refused(n_samples: Any) -> None:
    with pytest.raises(ValueError, match="n_samples must be a positive integer but got"):
        TrainingTimePredictor(_linear(), target_fraction=0.6, n_samples=n_samples)


def test_fewer_samples_than_the_spectrum_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 12, .* but got 11. Use task.subset\(\)"):
        TrainingTimePredictor(_linear(), target_fraction=0.6, n_samples=11)


def test_batch_sizes_and_epochs_are_those_of_all_samples() -> None:
    predictor = TrainingTimePredictor(_linear(), target_fraction=0.6, n_samples=100)
    prediction = predictor.predict(0.02, [1, 30, 100])
    np.testing.assert_array_equal(prediction.batch_size, [1, 30, 100])
    np.testing.assert_allclose(prediction.epochs, prediction.steps / [100, 4, 1])
    with pytest.raises(ValueError, match="from 1 to the number of samples, 100"):
        predictor.predict(0.02, 101)


def test_uncertainty_grows_with_the_number_of_samples() -> None:
    widths = []
    for n_samples in (12, 24, 100, 1000):
        prediction = TrainingTimePredictor(
            _linear(), target_fraction=0.6, n_samples=n_samples
        ).predict(0.02, n_samples)
        widths.append(float(np.log(prediction.steps_high / prediction.steps_low)))
    assert widths == sorted(widths)
    assert widths[-1] > widths[0]


def _first_losses(predictor: TrainingTimePredictor, batch_size: int) -> NDArray[np.float64]:
    return predictor.predict(1e-3, batch_size, full_curve=True).curve_losses[:2]


@cache
def _first_losses_alone(batch_size: int) -> NDArray[np.float64]:
    """Of the twelve samples that the predictor knows."""
    predictor = TrainingTimePredictor(_linear(), target_fraction=0.6, max_steps=2)
    return _first_losses(predictor, batch_size)


@given(n_samples=st.integers(12, 10**6), share=st.floats(0, 1))
@settings(max_examples=40)
def test_batches_stand_for_batches_with_as_much_noise(n_samples: int, share: float) -> None:
    """A batch of all samples has none, one of a single sample is as noisy as can be."""
    batch_size = max(1, round(share * n_samples))
    larger = TrainingTimePredictor(
        _linear(), target_fraction=0.6, n_samples=n_samples, max_steps=2
    )
    actual = _first_losses(larger, batch_size)
    gamma = (n_samples - batch_size) / ((n_samples - 1) * batch_size)
    # gamma = (12 - b) / (11 b) of a batch of b of the twelve samples.
    wanted = 12.0 / (1.0 + 11.0 * gamma)
    candidates = {max(1, math.floor(wanted)), math.ceil(wanted)}
    assert any(np.array_equal(actual, _first_losses_alone(b)) for b in candidates)
    if batch_size == n_samples:
        np.testing.assert_array_equal(actual, _first_losses_alone(12))
    if batch_size == 1:
        np.testing.assert_array_equal(actual, _first_losses_alone(1))


def test_epochs_of_a_schedule_are_those_of_all_samples() -> None:
    """The schedule of a training loop over 96 samples knows nothing of the subset."""
    by_epoch, by_step = Schedule.step(3, 0.3, every="epoch"), Schedule.step(3 * 12, 0.3)
    predictions = [
        TrainingTimePredictor(
            _linear(),
            target_fraction=0.6,
            n_samples=96,
            schedule=schedule,
            settings=PredictorSettings(exact=True),
        ).predict(0.01, 8, max_steps=2000)
        for schedule in (by_epoch, by_step)
    ]
    np.testing.assert_array_equal(predictions[0].curve_losses, predictions[1].curve_losses)
    assert predictions[0].steps.item() == predictions[1].steps.item()


@cache
def _learnable(kind: str, seed: int | None = None) -> Spectrum:
    """The spectrum of 96 samples of three classes, or of a third of them."""
    x, y = separated(96)
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    task = FineTuningTask(mlp() if kind == "mlp" else torch.nn.Linear(6, 3), (x, y))
    return _spectrum(task if seed is None else task.subset(32, seed=seed))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("target_fraction", [0.7, 0.4, 0.2])
def test_time_predicted_from_a_subset_is_close_to_that_of_all_samples(
    kind: str, target_fraction: float
) -> None:
    whole = _learnable(kind)
    rate = 0.02 / float(LinearisedModel.from_spectrum(whole).curvatures[0])
    expected = TrainingTimePredictor(whole, target_fraction=target_fraction).predict(rate, 96)
    assert expected.steps.item() > 20
    errors = []
    for seed in (0, 1, 2):
        part = _learnable(kind, seed)
        larger, plain = (
            TrainingTimePredictor(
                part, target_fraction=target_fraction, n_samples=n_samples
            ).predict(rate, n_samples)
            for n_samples in (96, 32)
        )
        errors.append(abs(math.log(larger.steps.item() / expected.steps.item())))
        # Full batches of both have no noise.
        assert larger.steps == plain.steps
        assert larger.steps_low <= expected.steps <= larger.steps_high
        assert larger.steps_high / larger.steps_low >= plain.steps_high / plain.steps_low
    assert max(errors) < 0.35


# How the time depends on the number of samples


def _convergence(times: list[float], spread: float = 0.0) -> SampleConvergence:
    n = len(times)
    return SampleConvergence(10 * 2 ** np.arange(n), np.array(times), np.full(n, spread))


@given(
    times=st.lists(st.floats(-5, 5) | st.just(math.inf), min_size=1, max_size=5),
    n_samples=st.integers(1, 10**6),
    spread=st.floats(0, 1),
)
def test_error_is_finite_and_grows_with_the_number_of_samples(
    times: list[float], n_samples: int, spread: float
) -> None:
    convergence = _convergence(times, spread)
    error = convergence.error(n_samples)
    assert 0.0 <= error < math.inf
    assert convergence.error(2 * n_samples) >= error
    if n_samples <= convergence.n_samples[-1]:
        assert error == 0.0
    assert 1 <= convergence.recommended(n_samples) <= n_samples


def test_error_of_subsets_in_closed_form() -> None:
    # The last two doublings moved it by 0.1 and 0.3: sqrt(0.05) each, three more to come.
    drift = math.sqrt(0.05)
    assert _convergence([0.0, 0.5, 0.6, 0.9]).error(640) == pytest.approx(3 * drift)
    assert _convergence([0.0, 0.5, 0.6, 0.3]).error(160) == pytest.approx(drift)
    # Half of the samples scatter by 0.2; all of infinitely many by sqrt(2) less.
    assert _convergence([0.0] * 4, 0.2).error(10**9) == pytest.approx(0.2 / math.sqrt(2))


def test_unknown_times_are_uncertain() -> None:
    assert _convergence([0.0, 0.1]).error(80) == 1.0
    assert _convergence([0.1, math.inf, 0.2]).error(160) == 1.0


def test_recommended_number_of_samples() -> None:
    # The same time from 20 samples on.
    assert _convergence([0.0, 0.6, 0.6, 0.6]).recommended(10**6) == 20
    assert _convergence([0.0, 0.0, 0.0, 0.0]).recommended(10**6) == 10
    # Subsets scatter by a fifth: one doubling halves that variance twice.
    assert _convergence([0.0] * 4, 0.2).recommended(10**6) == 160
    # It still changes: by 0.04 with every doubling, of which two are too little to matter.
    assert _convergence([0.0, 0.4, 0.44, 0.48]).recommended(1280) == 320
    assert _convergence([0.0, 0.4, 0.8, 1.2]).recommended(10**6) == 10**6
    assert _convergence([0.0, 0.4, 0.8, 1.2]).recommended(320) == 320
    assert _convergence([0.0, 0.4, 0.8, 1.2]).recommended(80) == 80


def test_convergence_is_measured_on_restricted_kernels() -> None:
    model = LinearisedModel.from_spectrum(spectrum("mse", n_samples=40), dtype=torch.float64)
    initial = float(model.loss(model.initial_outputs[None]))
    target = Target("loss", 0.6 * initial)
    measured = SampleConvergence.measure(model, target, seed=3)
    np.testing.assert_array_equal(measured.n_samples, [5, 10, 20, 40])
    generator = torch.Generator().manual_seed(3)
    rate = 0.5 / float(model.curvatures[0])
    for k, n_chosen in enumerate(measured.n_samples):
        logs = []
        for _ in range(1 if n_chosen == 40 else 4):
            chosen = torch.randperm(40, generator=generator)[:n_chosen].numpy()
            kernel = torch.einsum(
                "ncr,mdr->ncmd", model.features[chosen], model.features[chosen]
            ).reshape(3 * n_chosen, 3 * n_chosen)
            outputs = model.initial_outputs[chosen].reshape(-1)
            wanted = model.soft_targets[chosen].reshape(-1)
            start = float((outputs - wanted).square().mean())
            n_steps = 0
            while float((outputs - wanted).square().mean()) > 0.6 * start and n_steps < 10_000:
                outputs = outputs - rate * kernel @ (outputs - wanted) * 2.0 / (3 * n_chosen)
                n_steps += 1
            logs.append(math.log(rate * n_steps))
        assert measured.log_times[k] == pytest.approx(np.mean(logs), abs=0.1)
        assert measured.log_spread[k] == pytest.approx(np.std(logs), abs=0.1)


def test_convergence_of_a_validation_target_is_that_of_the_same_target() -> None:
    """The initial loss of the validation samples is the same for every training subset."""
    task = linear_task(n_samples=24, seed=2)
    x, y = task._dataset.tensors
    one = _spectrum(FineTuningTask(task.model, (x, y), validation_data=(x[::2], y[::2])))
    model = LinearisedModel.from_spectrum(one, dtype=torch.float64)
    assert model.validation is not None
    initial = float(model.validation.loss(model.validation.initial_outputs[None]))
    target = Target("validation_loss", 0.97 * initial)
    measured = SampleConvergence.measure(model, target, seed=0, max_steps=500)
    generator = torch.Generator().manual_seed(0)
    rate = 0.5 / float(model.curvatures[0])
    for k, n_chosen in enumerate(measured.n_samples):
        logs = []
        for _ in range(1 if n_chosen == 24 else 4):
            part = model.restricted(torch.randperm(24, generator=generator)[:n_chosen])
            curves = simulate(
                part,
                SGDConfigurations.of(rate),
                np.array([n_chosen]),
                max_steps=np.array([500]),
                target=target,
            )
            logs.append(math.log(rate * max(1.0, curves.first_passage_times(target)[0])))
        assert measured.log_times[k] == pytest.approx(np.mean(logs), abs=1e-9)
