from __future__ import annotations

from dataclasses import replace
import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp
import torch

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate_equation
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from optuna_ttp.task import Loss
from tests.cases import linear_task
from tests.cases import spectrum
from tests.closed_forms import mse_gradient_flow


_METHODS: list[Any] = ["linear", "ode", "sde"]


def _double(one: Spectrum) -> LinearisedModel:
    return LinearisedModel.from_spectrum(one, dtype=torch.float64)


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


def _solved(
    model: LinearisedModel,
    batch_size: int,
    n_steps: int,
    method: Any,
    sgd: SGDConfigurations,
    seed: int = 0,
) -> Trajectories:
    return simulate_equation(
        model,
        sgd,
        np.full(len(sgd), batch_size),
        max_steps=np.full(len(sgd), n_steps),
        method=method,
        seed=seed,
    )


# Without noise


@pytest.mark.parametrize(
    "optimiser",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"dampening": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [3, 12])
def test_flow_of_the_mse_is_the_closed_form_with_the_effective_learning_rate(
    batch_size: int, optimiser: dict[str, Any]
) -> None:
    one = spectrum("mse")
    effective = 0.05 / float(_double(one).curvatures[0])
    rate = effective * (1.0 - optimiser.get("momentum", 0.0))
    curves = _solved(_double(one), batch_size, 300, "ode", SGDConfigurations.of(rate, **optimiser))
    np.testing.assert_array_equal(curves.steps[0], np.arange(301))
    closed = mse_gradient_flow(one, effective, np.arange(301))
    np.testing.assert_allclose(curves.curves["loss"][0], closed, rtol=1e-6)


def test_dampening_slows_the_flow() -> None:
    one = spectrum("mse")
    effective = 0.05 / float(_double(one).curvatures[0])
    curves = _solved(
        _double(one), 12, 50, "ode", SGDConfigurations.of(effective, 0.5, dampening=0.5)
    )
    closed = mse_gradient_flow(one, effective, np.arange(51))
    np.testing.assert_allclose(curves.curves["loss"][0], closed, rtol=1e-6)


@pytest.mark.parametrize("relative_rate", [0.9, 1.9, 10.0, 100.0])
def test_flow_is_stable_at_every_learning_rate(relative_rate: float) -> None:
    one = spectrum("mse")
    rate = relative_rate / float(_double(one).curvatures[0])
    curves = _solved(_double(one), 12, 40, "ode", SGDConfigurations.of(rate))
    closed = mse_gradient_flow(one, rate, np.arange(41))
    np.testing.assert_allclose(curves.curves["loss"][0], closed, atol=0.02 * closed[0])
    assert (np.diff(curves.curves["loss"][0]) <= 0).all()


@pytest.mark.parametrize(
    "loss", [Loss("cross_entropy"), Loss("cross_entropy", 0.1, (0.5, 2.0, 1.0))], ids=str
)
def test_flow_of_the_cross_entropy_is_that_of_a_solver(loss: Loss) -> None:
    one = spectrum(loss)
    model = _double(one)
    kernel = (one.eigenvectors * one.eigenvalues) @ one.eigenvectors.T
    soft_targets, normalisers = loss.soft_targets(one.targets, 3)

    def change(_: float, flat: Any) -> Any:
        outputs = flat.reshape(12, 3)
        p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = p * soft_targets.sum(axis=1, keepdims=True) - soft_targets
        return -0.2 / (1 - 0.5) * kernel @ (gradient / normalisers.sum()).ravel()

    solution = solve_ivp(
        change,
        (0, 60),
        one.initial_outputs.ravel(),
        t_eval=np.arange(61),
        rtol=1e-9,
        atol=1e-11,
    )
    outputs = torch.as_tensor(solution.y.T.reshape(-1, 12, 3))
    curves = _solved(model, 5, 60, "ode", SGDConfigurations.of(0.2, 0.5))
    expected = model.loss(outputs).numpy()
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(curves.curves["loss"][0], expected, rtol=1e-4)
    np.testing.assert_array_equal(curves.curves["accuracy"][0], model.accuracy(outputs).numpy())


def test_flow_with_a_schedule_is_that_of_the_time_it_makes() -> None:
    one = spectrum("mse")
    rate = 0.05 / float(_double(one).curvatures[0])
    schedule = Schedule.cosine(80, warmup_steps=10)
    curves = _solved(_double(one), 12, 100, "ode", SGDConfigurations.of(rate, schedule=schedule))
    multipliers = schedule.values(np.ones(1), np.zeros(1), 1, 100)[0][0]
    times = np.concatenate([[0.0], np.cumsum(multipliers)])
    closed = mse_gradient_flow(one, rate, times)
    np.testing.assert_allclose(curves.curves["loss"][0], closed, rtol=1e-6)


def test_schedule_that_counts_epochs_counts_those_of_the_batch_size() -> None:
    one = spectrum("mse")
    rate = 0.05 / float(_double(one).curvatures[0])
    schedule = Schedule.step(2, 0.1, every="epoch")
    curves = _solved(_double(one), 3, 20, "ode", SGDConfigurations.of(rate, schedule=schedule))
    # Twelve samples are four steps an epoch.
    times = np.concatenate([[0.0], np.cumsum(0.1 ** (np.arange(20) // 8))])
    closed = mse_gradient_flow(one, rate, times)
    np.testing.assert_allclose(curves.curves["loss"][0], closed, rtol=1e-6)


def test_curve_ends_where_the_target_is_reached() -> None:
    model = _double(spectrum())
    target = Target("loss", 0.8 * float(model.loss(model.initial_outputs[None])))
    settings: dict[str, Any] = {"max_steps": np.array([500, 500]), "method": "ode"}
    sgd, batch_sizes = SGDConfigurations.of([0.1, 1e-9]), np.array([12, 12])
    ended = simulate_equation(model, sgd, batch_sizes, target=target, **settings)
    whole = simulate_equation(model, sgd, batch_sizes, target=target, full_curves=True, **settings)
    times = ended.first_passage_times(target)
    np.testing.assert_array_equal(times, whole.first_passage_times(target))
    assert times[0] == np.nanmax(ended.steps[0]) < 500
    assert times[1] == math.inf
    assert not np.isnan(whole.steps).any()


# With noise


def _flat(n_outputs: int, n_samples: int = 4) -> LinearisedModel:
    """Least squares at its optimum, whose samples pull as strongly in opposite directions."""
    targets = torch.tensor([10.0, -10.0], dtype=torch.float64).repeat(n_samples // 2)[:, None]
    features = torch.diag(torch.arange(1.0, n_outputs + 1, dtype=torch.float64))
    return LinearisedModel(
        features=features.repeat(n_samples, 1, 1),
        initial_outputs=torch.zeros(n_samples, n_outputs, dtype=torch.float64),
        soft_targets=targets.repeat(1, n_outputs),
        normalisers=torch.ones(n_samples, dtype=torch.float64),
        labels=None,
        kind="mse",
    )


@pytest.mark.parametrize(
    ("batch_size", "optimiser", "relative"),
    [
        (1, {}, 1.0),
        (2, {}, 1.0),
        (1, {"momentum": 0.9}, 10.0),
        (1, {"momentum": 0.9, "dampening": 0.5}, 5.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_noise_of_a_flat_problem_spreads_as_its_equation_says(
    n_outputs: int, batch_size: int, optimiser: dict[str, Any], relative: float
) -> None:
    model = _flat(n_outputs)
    rate, n_steps, n_copies = 1e-4, 20, 4000
    forces = 2.0 * 10.0 / n_outputs * np.arange(1, n_outputs + 1)
    np.testing.assert_allclose(model.gradient_variances.numpy(), forces**2)
    rates = np.full(n_copies, rate)
    curves = _solved(model, batch_size, n_steps, "sde", SGDConfigurations.of(rates, **optimiser))
    variances = (relative * rate) ** 2 / batch_size * forces**2 * n_steps
    # Each direction adds its mean square over the samples and the outputs to the loss.
    expected = (variances * np.arange(1, n_outputs + 1) ** 2).sum() / n_outputs
    excess = curves.curves["loss"][:, -1] - 100.0
    assert excess.mean() == pytest.approx(expected, rel=0.1)
    assert curves.curves["loss"][:, 0] == pytest.approx(100.0)


def test_noise_of_divided_steps_is_the_recursion_of_its_variance() -> None:
    n_samples, batch_size, n_steps, n_parts = 40, 20, 6, 8
    model = _flat(1, n_samples)
    assert float(model.curvatures[0]) == pytest.approx(2.0)
    # A change of the direction by 3.8 in a step, so in eight parts: by 0.475 in each.
    rate, change = 1.9, 1.9 * 2.0 / n_parts
    rates = np.full(4000, rate)
    curves = _solved(model, batch_size, n_steps, "sde", SGDConfigurations.of(rates))
    noise = (rate / n_parts) ** 2 * (n_parts / batch_size) * 20.0**2
    variance, expected = 0.0, [100.0]
    for _ in range(n_steps):
        for _ in range(n_parts):
            # The noise is rescaled by the loss over the initial one.
            variance = (1.0 - change) ** 2 * variance + noise * (1.0 + variance / 100.0)
        expected.append(100.0 + variance)
    excess = curves.curves["loss"].mean(axis=0) - 100.0
    np.testing.assert_allclose(excess[1:], np.array(expected[1:]) - 100.0, rtol=0.1)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_full_batches_have_no_noise(loss: str) -> None:
    model = _double(spectrum(loss))
    sgd = SGDConfigurations.of([0.02, 0.05], 0.5)
    ode, sde = (_solved(model, 12, 50, method, sgd) for method in ("ode", "sde"))
    for quantity in ode.curves:
        np.testing.assert_array_equal(sde.curves[quantity], ode.curves[quantity])
    noisy = _solved(model, 4, 50, "sde", sgd)
    assert not np.allclose(noisy.curves["loss"], ode.curves["loss"], rtol=1e-6)


def test_mean_over_the_noise_of_slow_training_is_the_flow() -> None:
    model = _double(spectrum("mse"))
    rate = 0.003 / float(model.curvatures[0])
    flow = _solved(model, 4, 200, "ode", SGDConfigurations.of(rate)).curves["loss"][0]
    noisy = _solved(model, 4, 200, "sde", SGDConfigurations.of(np.full(300, rate))).curves["loss"]
    spread = noisy[:, 1:].std(axis=0)
    assert (spread > 0).all()
    error = np.abs(noisy[:, 1:].mean(axis=0) - flow[1:])
    assert (error < 0.005 * flow[1:]).all()
    seeds = [
        _solved(model, 4, 200, "sde", SGDConfigurations.of(rate), seed).curves["loss"][0, -1]
        for seed in range(40)
    ]
    assert len(set(seeds)) == 40
    assert np.mean(seeds) == pytest.approx(flow[-1], rel=0.01)
    assert np.std(seeds) == pytest.approx(spread[-1], rel=0.4)


def test_noise_falls_with_the_batch_size_and_the_loss() -> None:
    model = _double(spectrum("mse"))
    rate = 0.02 / float(model.curvatures[0])
    spreads = [
        _solved(model, batch_size, 10, "sde", SGDConfigurations.of(np.full(500, rate)))
        .curves["loss"][:, 10]
        .std()
        for batch_size in (1, 4)
    ]
    assert spreads[0] / spreads[1] == pytest.approx(2.0, rel=0.15)


def test_loss_that_the_noise_drives_away_counts_as_blown_up() -> None:
    one = spectrum("mse")
    model = _double(one)
    rate = 40.0 / float(model.curvatures[0])
    curves = _solved(model, 1, 30, "sde", SGDConfigurations.of([rate, 1e-6]))
    last = curves.curves["loss"][0][np.isfinite(curves.steps[0])][-1]
    assert not last < 100 * curves.curves["loss"][0, 0]
    assert curves.blown_up.tolist() == [True, False]


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_weight_decay_is_refused(method: Any) -> None:
    model = _double(spectrum())
    with pytest.raises(ValueError, match=r"equation has no weight decay: .* but got 0\.1"):
        _solved(model, 4, 10, method, SGDConfigurations.of([0.1, 0.2], weight_decay=[0.0, 0.1]))
    with pytest.raises(ValueError, match="equation has no weight decay"):
        TrainingTimePredictor(
            _linear(),
            target_fraction=0.6,
            optimizer=SGD(weight_decay=0.1),
            settings=PredictorSettings(method=method),
        ).predict(0.1, 4)


# In a prediction


def test_predicted_steps_are_those_of_the_closed_form() -> None:
    one = _linear("mse")
    rate = 0.02 / float(_double(one).curvatures[0])
    closed = mse_gradient_flow(one, rate, np.arange(3000))
    predictor = TrainingTimePredictor(
        one, target_fraction=0.6, settings=PredictorSettings(method="ode")
    )
    expected = np.argmax(closed <= 0.6 * closed[0])
    prediction = predictor.predict([rate, 0.1 * rate], [5, 12], [0.0, 0.9])
    np.testing.assert_allclose(prediction.steps, expected, atol=1)
    assert (prediction.outcomes == "converges").all()


@pytest.mark.parametrize("learning_rate", [0.02, 0.05])
def test_noise_changes_slow_predictions_little(learning_rate: float) -> None:
    ode, sde = (
        TrainingTimePredictor(
            _linear(), target_fraction=0.6, settings=PredictorSettings(method=method, n_seeds=3)
        )
        for method in _METHODS[1:]
    )
    flow = ode.predict(learning_rate, 4).steps.item()
    assert sde.predict(learning_rate, 4).steps.item() == pytest.approx(flow, rel=0.15)
    assert sde.predict(learning_rate, 12).steps.item() == flow


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_accuracy_is_a_target(method: Any) -> None:
    predictor = TrainingTimePredictor(
        _linear(), target_accuracy=0.75, settings=PredictorSettings(method=method, n_seeds=1)
    )
    prediction = predictor.predict([0.02, 0.1], [4, 12])
    assert (prediction.outcomes == "converges").all()
    shares = prediction.curves["accuracy"]
    for k in range(2):
        step = int(prediction.steps[k])
        assert shares[k, step] >= 0.75 > shares[k, :step].max()


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_validation_targets_are_not_mistaken_for_training_targets(method: Any) -> None:
    """The equation has no validation curves: it must refuse, or watch the validation samples."""
    task = linear_task()
    x, y = task._dataset.tensors
    # Half the labels are wrong, so that the validation loss falls much less.
    held_out = (x, torch.where(torch.arange(12) % 2 == 0, y, (y + 1) % 3))
    one = compute_spectrum(
        FineTuningTask(task.model, (x, y), validation_data=held_out),
        dtype="float64",
        measure_speed=False,
        probe=False,
    )
    model = _double(one).validation
    assert model is not None
    goal = 0.98 * float(model.loss(model.initial_outputs[None]))
    linear = TrainingTimePredictor(
        one, target_validation_loss=goal, settings=PredictorSettings(exact=True)
    )
    expected = linear.predict(0.02, 12)
    try:
        predictor = TrainingTimePredictor(
            one, target_validation_loss=goal, settings=PredictorSettings(method=method)
        )
    except ValueError:
        return
    actual = predictor.predict(0.02, 12)
    assert actual.outcome == expected.outcome
    assert actual.steps.item() == pytest.approx(expected.steps.item(), rel=0.05)


def test_flow_and_simulation_agree_on_slow_training() -> None:
    linear, ode = (
        TrainingTimePredictor(
            _linear(), target_fraction=0.6, settings=PredictorSettings(method=method)
        )
        for method in _METHODS[:2]
    )
    expected = linear.predict(0.01, 12, 0.5).steps.item()
    assert expected > 100
    assert ode.predict(0.01, 12, 0.5).steps.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_same_seed_gives_the_same_prediction(method: Any) -> None:
    def predict(seed: int) -> Any:
        predictor = TrainingTimePredictor(
            _linear(), target_fraction=0.6, settings=PredictorSettings(method=method, seed=seed)
        )
        return predictor.predict([0.05, 0.1], [3, 4], 0.5, max_steps=300)

    first, same, other = predict(5), predict(5), predict(6)
    np.testing.assert_array_equal(first.curve_losses, same.curve_losses)
    np.testing.assert_array_equal(first.steps, same.steps)
    n = min(first.curve_losses.shape[1], other.curve_losses.shape[1])
    equal = np.array_equal(first.curve_losses[:, :n], other.curve_losses[:, :n], equal_nan=True)
    assert equal == (method == "ode")


def test_seeds_of_noise_are_averaged() -> None:
    def time(n_seeds: int, seed: int) -> tuple[float, float]:
        """Steps, and the logarithm of the time that they are rounded up from."""
        predictor = TrainingTimePredictor(
            _linear(),
            target_fraction=0.5,
            settings=PredictorSettings(method="sde", n_seeds=n_seeds, seed=seed),
        )
        prediction = predictor.predict(0.2, 3, 0.5)
        half = np.isclose(DEPTHS, math.log(2.0))
        return prediction.steps.item(), prediction.log_first_passage_times[half].item()

    alone = [time(1, seed)[1] for seed in (4, 5, 6)]
    assert len(set(alone)) > 1
    steps, log_time = time(3, 4)
    assert log_time == pytest.approx(np.mean(alone), abs=1e-12)
    assert steps == math.ceil(math.exp(np.mean(alone)) - 1e-9)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_configurations_that_are_all_hopeless_diverge(method: Any) -> None:
    predictor = TrainingTimePredictor(
        _linear(), target_fraction=0.6, settings=PredictorSettings(method=method)
    )
    limit = predictor.max_learning_rate(4)
    assert predictor.predict(100 * limit, 4).outcome == "diverges"
    mixed = predictor.predict([100 * limit, 0.1 * limit], 4)
    assert mixed.outcomes.tolist() == ["diverges", "converges"]


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_epsilon_and_score_work(method: Any) -> None:
    predictor = TrainingTimePredictor(
        _linear(), target_epsilon=0.2, max_steps=100, settings=PredictorSettings(method=method)
    )
    assert 0 < predictor.predict(0.1, 4).steps.item() < 100
    predictor = TrainingTimePredictor(
        _linear(), target_fraction=0.6, settings=PredictorSettings(method=method)
    )
    slow, fast = predictor.score([0.02, 0.1], 12)
    assert fast < slow < math.inf


def test_unknown_method_is_refused() -> None:
    method: Any = "euler"
    with pytest.raises(ValueError, match="method must be one of linear, sde, ode but got 'euler'"):
        TrainingTimePredictor(
            _linear(), target_fraction=0.5, settings=PredictorSettings(method=method)
        )
