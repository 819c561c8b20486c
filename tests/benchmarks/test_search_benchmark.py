"""The benchmark of searches: its clock, its workers, and what it counts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from benchmarks.search import compare
from benchmarks.search import contestants
from benchmarks.search.predictors import recorded_times
from benchmarks.search.predictors import rule_of_thumb
from benchmarks.search.predictors import ShuffledPredictor
from benchmarks.search.recording import read
from benchmarks.search.recording import Run
from benchmarks.search.recording import write
from benchmarks.search.replay import replay
from benchmarks.search.replay import Search
from benchmarks.search.summary import summary
from benchmarks.search.table import from_recording
from benchmarks.search.table import Table
from benchmarks.search.table import Trajectory
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import PredictorSettings
from optuna_ttp import Throughput
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.study._attributes import CURVE


def _nothing() -> float:
    return 0.0


def _table(trajectories: dict[int, Trajectory]) -> Table:
    """A table of one hyperparameter that counts."""
    values = {
        "learning_rate": tuple(0.1 * (k + 1) for k in range(len(trajectories))),
        "batch_size": (8.0,),
        "momentum": (0.0,),
    }
    by_places: dict[tuple[int, ...], Trajectory] = {(k, 0, 0): t for k, t in trajectories.items()}
    n_epochs = max(len(t.seconds) for t in trajectories.values())
    return Table("made up", "metric", values, by_places, "maximize", n_epochs)


def _trajectory(seconds: list[float], reports: list[float], value: float) -> Trajectory:
    return Trajectory(np.array(seconds), np.array(reports), value)


def _grid(rates: list[int]) -> optuna.samplers.BaseSampler:
    """Proposes these places of the learning rate, one after the other."""
    return _InOrder(rates)


class _InOrder(optuna.samplers.BaseSampler):
    def __init__(self, places: list[int]) -> None:
        self._places = itertools.chain(places, itertools.repeat(0))

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {"learning_rate": optuna.distributions.IntDistribution(0, 99)}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {"learning_rate": next(self._places)}

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return 0


class _PruneAt(optuna.pruners.BasePruner):
    """Prunes trials with these numbers once they have reported so many epochs."""

    def __init__(self, epochs: dict[int, int]) -> None:
        self._epochs = epochs

    def prune(self, study: Any, trial: optuna.trial.FrozenTrial) -> bool:
        return (trial.last_step or 0) >= self._epochs.get(trial.number, 99)


_THREE = {
    0: _trajectory([1.0, 2.0], [0.3, 0.5], 0.5),
    1: _trajectory([3.0, 3.0], [0.4, 0.8], 0.8),
    2: _trajectory([5.0, 5.0], [0.5, 1.0], 1.0),
}


def _search(places: list[int], **options: Any) -> Search:
    arguments: dict[str, Any] = {"budget_seconds": 1e3, "overhead": _nothing, **options}
    pruner = arguments.pop("pruner", optuna.pruners.NopPruner())
    return replay(_table(_THREE), _grid(places), pruner, **arguments)


def test_trials_pay_for_their_epochs_one_after_the_other() -> None:
    search = _search([0, 1, 2])
    assert [(t.began, t.ended) for t in search.trials] == [(0, 3), (3, 9), (9, 19)]
    assert search.seconds_to_best == search.seconds_to_close == 19


def test_the_search_ends_with_the_best_of_the_grid() -> None:
    assert len(_search([0, 2, 1, 0]).trials) == 2


def test_pruned_trials_pay_to_the_pruned_epoch() -> None:
    search = _search([2, 1, 2], pruner=_PruneAt({0: 1, 1: 0}))
    assert [(t.ended, t.epochs, t.pruned) for t in search.trials] == [
        (5, 1, True),
        (5, 0, True),
        (15, 2, False),
    ]
    assert search.trials[0].value != search.trials[0].value
    states = [t.state for t in search.study.trials[:3]]
    assert states == [optuna.trial.TrialState.PRUNED] * 2 + [optuna.trial.TrialState.COMPLETE]


def test_setup_and_overhead_are_charged() -> None:
    ticks = itertools.count()

    def tick() -> float:
        return 0.25 * next(ticks)  # Whatever is computed takes a quarter of a second.

    search = _search([0, 2], setup_seconds=10.0, overhead=tick)
    # To ask, after each of two epochs, and to tell.
    first, second = search.trials
    assert (first.began, first.ended) == (10.0, 10.0 + 3.0 + 0.75)
    assert second.began == first.ended + 0.25
    assert second.ended == second.began + 10.0 + 0.75
    assert search.overhead_seconds == pytest.approx(8 * 0.25)


def test_what_ends_after_the_budget_does_not_count() -> None:
    search = _search([0, 1, 2], budget_seconds=10.0)
    assert len(search.trials) == 2
    assert math.isinf(search.seconds_to_best)


def test_the_worker_that_is_free_first_asks_next() -> None:
    # A: 0 from 0 to 3, then 1 from 3 to 9. B: 1 from 0 to 6, then 2 from 6 to 16.
    search = _search([0, 1, 1, 2], n_workers=2)
    assert [(t.places[0], t.began, t.ended) for t in search.trials[:3]] == [
        (0, 0, 3),
        (1, 0, 6),
        (1, 3, 9),
    ]
    assert search.seconds_to_best == 16


def test_workers_see_what_the_others_have_reported_by_then() -> None:
    seen = []

    class Looks(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: optuna.trial.FrozenTrial) -> bool:
            if trial.last_step is not None:
                steps = [t.last_step or 0 for t in study.get_trials() if t.number != trial.number]
                seen.append((trial.number, trial.last_step, steps[0]))
            return False

    _search([1, 2], n_workers=2, budget_seconds=9.0, pruner=Looks())
    # Trial 0 reports at 3 and 6, trial 1 at 5.
    assert seen[:3] == [(0, 1, 0), (1, 1, 1), (0, 2, 1)]


def test_durations_are_simulated() -> None:
    search = _search([0, 1, 2])
    durations = [t.duration.total_seconds() for t in search.study.trials[:3] if t.duration]
    assert durations == [3.0, 6.0, 10.0]


def test_logs_have_simulated_times() -> None:
    losses = (np.array([1.0, 0.9]), np.array([0.8, 0.7]))
    trajectory = Trajectory(np.array([4.0, 4.0]), np.array([0.3, 0.5]), 0.5, losses)
    search = replay(
        _table({0: trajectory}),
        _grid([0]),
        optuna.pruners.NopPruner(),
        budget_seconds=20.0,
        logged=True,
        overhead=_nothing,
    )
    curve = search.study.trials[0].user_attrs[CURVE]
    assert curve["n_steps"] == 4
    assert curve["seconds_per_step"] == 2.0


def test_wrongly_pruned_winners_are_those_before_the_first_found() -> None:
    search = _search([2, 0, 2], pruner=_PruneAt({0: 1}))
    assert search.winners() == (2, 1)
    # Nothing was there to be found before.
    assert _search([0, 2]).winners() == (1, 0)


def test_regret_is_that_of_the_best_so_far() -> None:
    search = _search([0, 1, 2])
    # The median of the grid is 0.8, the best 1.0.
    regrets = search.regret_at(np.array([0.0, 4.0, 9.0, 18.9, 19.0]))
    assert regrets.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.0])


def test_a_table_knows_its_oracle() -> None:
    near = _trajectory([1.0, 1.0], [0.9, 0.995], 0.995)
    table = _table({**_THREE, 3: near})
    assert table.best == 1.0
    assert table.close == 0.99
    assert table.oracle_seconds == 2.0


def _run(rate: float, losses: list[float], accuracies: list[float], seconds: float = 1.0) -> Run:
    n = len(losses) - 1
    return Run(
        learning_rate=rate,
        batch_size=8,
        momentum=0.9,
        batch_losses=np.repeat(np.array(losses[:-1]), 2),
        training_loss=np.array(losses),
        training_accuracy=np.array(accuracies),
        validation_loss=np.array(losses),
        validation_accuracy=np.array(accuracies),
        training_seconds=np.full(n, seconds),
        validation_seconds=0.5,
    )


_RUNS = [
    _run(0.1, [2.0, 1.0, 0.9], [0.2, 0.5, 0.6]),
    _run(0.2, [2.0, 0.6, 0.15], [0.2, 0.7, 0.9], seconds=9.0),
    _run(0.4, [2.0, math.nan], [0.2, math.nan]),
]


def test_recordings_survive_their_file(tmp_path: Path) -> None:
    write(tmp_path / "task.npz", _RUNS)
    for before, after in zip(_RUNS, read(tmp_path / "task.npz"), strict=True):
        assert before.configuration == after.configuration
        for name in ("batch_losses", "training_loss", "validation_accuracy", "training_seconds"):
            np.testing.assert_allclose(
                getattr(before, name), getattr(after, name), rtol=1e-3, equal_nan=True
            )


def test_the_metric_table_charges_typical_seconds_and_gives_up_on_nan() -> None:
    table = from_recording("task", _RUNS, "metric")
    slow, good, bad = (table.trajectories[(k, 0, 0)] for k in range(3))
    # The median epoch of the batch size, and a validation.
    assert slow.seconds.tolist() == good.seconds.tolist() == [1.5, 1.5]
    assert (slow.value, good.value) == (0.6, 0.9)
    assert bad.total_seconds == 1.5
    assert math.isnan(bad.value)
    assert [len(part) for part in good.batch_losses] == [2, 2]


def test_the_time_table_ends_trials_at_the_target() -> None:
    table = from_recording("task", _RUNS, "time")
    slow, good, _ = (table.trajectories[(k, 0, 0)] for k in range(3))
    assert math.isnan(slow.value)
    assert slow.total_seconds == 2.0
    # From 0.6 to 0.15 in the second epoch, the target is 0.3: half of the way in logarithms.
    assert good.value == good.total_seconds == pytest.approx(1.5)
    assert table.oracle_seconds == pytest.approx(1.5)


def test_incomplete_recordings_are_refused() -> None:
    other = Run(**{**vars(_RUNS[0]), "batch_size": 16})
    with pytest.raises(ValueError, match="holds 4 of 3 x 2 x 1"):
        from_recording("task", [*_RUNS, other], "metric")


def _row(contestant: str, seconds: float, **other: Any) -> dict[str, Any]:
    return {
        "task": "a",
        "goal": "metric",
        "workers": 1,
        "contestant": contestant,
        "seed": 0,
        "oracle_seconds": 2.0,
        "budget_seconds": 100.0,
        "seconds_to_close": seconds,
        "setup_seconds": 0.0,
        "winners": 10,
        "wrongly_pruned": 1,
        **other,
    }


def test_the_summary_compares_with_the_best_pair_in_hindsight() -> None:
    rows = [
        _row("random + none", 52.0),
        _row("tpe + none", 22.0),
        _row("tpe + median", math.inf),
        _row("ours (tpe)", 4.0, setup_seconds=1.0),
        _row("ours (tpe), shuffled", 33.0),
    ]
    figures = summary(rows)
    assert figures["avoidable_seconds_vs_best_standard_1_worker"]["value"] == 0.1
    assert figures["seconds_vs_oracle"]["value"] == 2.0
    assert figures["seconds_vs_oracle"]["without_setup"] == 1.5
    # The setup and the oracle's two seconds.
    assert figures["seconds_vs_oracle"]["best_choice"] == 1.5
    assert figures["avoidable_seconds_vs_best_standard_1_worker"]["best_choice"] == 0.05
    assert "best_choice" not in figures["shuffled_vs_wrapped"]
    assert figures["shuffled_vs_wrapped"]["value"] == 1.5
    assert figures["wrongly_pruned_winners"]["value"] == 0.1
    assert figures["worst_task_vs_wrapped"]["value"] == pytest.approx(4 / 22, rel=1e-3)


def test_what_was_not_found_counts_as_the_budget() -> None:
    rows = [_row("tpe + none", 22.0), _row("ours (tpe)", math.inf)]
    rows += [_row("ours (tpe), shuffled", 1.0)]
    assert summary(rows)["seconds_vs_oracle"]["value"] == 50.0


@pytest.mark.parametrize("name", [*contestants.STANDARD, contestants.COST])
def test_every_standard_contestant_searches(name: str) -> None:
    rng = np.random.default_rng(0)
    trajectories = {
        k: _trajectory([1.0, 1.0, 1.0], rng.random(3).tolist(), float(rng.random()))
        for k in range(30)
    }
    table = _table(trajectories)

    def predictor() -> Any:
        raise AssertionError("Nothing is predicted here.")

    players = contestants.players(name, table, 0, predictor)
    search = replay(table, players.sampler, players.pruner, budget_seconds=60.0)
    assert search.trials
    assert not players.predicts


@pytest.fixture(scope="module")
def predictor() -> TrainingTimePredictor:
    torch.manual_seed(0)
    inputs = torch.randn(32, 4)
    task = FineTuningTask(torch.nn.Linear(4, 1), (inputs, inputs[:, :1]), loss="mse")
    return TrainingTimePredictor(
        compute_spectrum(task, measure_speed=False),
        target_fraction=0.5,
        settings=PredictorSettings(
            throughput=Throughput(np.array([8]), np.array([0.5]), device="cpu")
        ),
    )


_TIMED = from_recording(
    "task",
    [
        _run(0.01, [2.0, 1.9, 1.8], [0.2, 0.3, 0.3]),
        _run(0.02, [2.0, 1.5, 0.9], [0.2, 0.5, 0.6]),
        _run(0.04, [2.0, 0.5, 0.1], [0.2, 0.7, 0.9]),
    ],
    "metric",
)


def _all(table: Table) -> tuple[Any, Any, Any]:
    rates = np.array(table.values["learning_rate"])
    return rates, np.full(len(rates), 8), np.full(len(rates), 0.9)


def test_recorded_times_are_those_of_the_recording(predictor: TrainingTimePredictor) -> None:
    target = predictor.target.value
    table = from_recording(
        "task",
        [
            _run(0.01, [4 * target, 3 * target, 2 * target], [0.2, 0.3, 0.3]),
            # Two steps an epoch; half of the way from the first to the second, in logarithms.
            _run(0.02, [4 * target, 2 * target, 0.5 * target], [0.2, 0.5, 0.6]),
        ],
        "metric",
    )
    told = recorded_times(predictor, table)
    assert told.estimate(*_all(table)).steps.tolist() == [math.inf, 3.0]
    assert told.score(*_all(table)).tolist() == [math.inf, 1.5]


def test_an_error_changes_recorded_times(predictor: TrainingTimePredictor) -> None:
    exact = recorded_times(predictor, _TIMED).score(0.04, 8, 0.9)
    wrong = {
        float(recorded_times(predictor, _TIMED, log_sd=2.0, seed=k).score(0.04, 8, 0.9))
        for k in range(5)
    }
    assert len(wrong | {float(exact)}) > 2


def test_the_rule_of_thumb_falls_with_the_learning_rate(predictor: TrainingTimePredictor) -> None:
    steps = rule_of_thumb(predictor, _TIMED).estimate(*_all(_TIMED)).steps
    assert steps[0] / steps[2] == pytest.approx(4.0, rel=0.2)


def test_a_shuffled_predictor_says_the_same_of_other_configurations(
    predictor: TrainingTimePredictor,
) -> None:
    straight = predictor.score(*_all(_TIMED))
    orders = set()
    for seed in range(6):
        shuffled = ShuffledPredictor.of(predictor, _TIMED, seed)
        scores = shuffled.score(*_all(_TIMED))
        assert sorted(scores) == pytest.approx(sorted(straight))
        np.testing.assert_array_equal(scores, shuffled.score(*_all(_TIMED)))
        orders.add(tuple(np.argsort(scores)))
    assert len(orders) > 1


# The curves are made up, and predictions that are wrong are told to be.
@pytest.mark.filterwarnings("ignore::optuna_ttp.UnreliablePredictionWarning")
@pytest.mark.parametrize(
    "name", ["ours (tpe)", "ours (gp)", *contestants.SHUFFLED, contestants.RULE, contestants.KNOWN]
)
@pytest.mark.parametrize("goal", ["metric", "time"])
def test_ours_search_with_any_predictor(
    predictor: TrainingTimePredictor, name: str, goal: Any
) -> None:
    first = predictor.initial_loss
    runs = [
        _run(
            0.001 * 2**k,
            [first, first / (1.0 + 0.3 * k), first / (1.0 + k)],
            [0.2, 0.5, 0.1 * k],
        )
        for k in range(8)
    ]
    table = from_recording("task", runs, goal)
    players = contestants.players(name, table, 0, lambda: predictor)
    assert players.predicts
    search = replay(
        table, players.sampler, players.pruner, budget_seconds=200.0, logged=True, max_trials=12
    )
    assert math.isfinite(search.seconds_to_close)


def test_a_job_goes_on_with_the_seeds_that_are_missing() -> None:
    job = compare.Job("a", "metric", "tpe + none", 1, (0, 1, 2))
    rows = [("metric", 1, "a", "tpe + none", 1), ("time", 1, "a", "tpe + none", 0)]
    assert job.without(set(rows)).seeds == (0, 2)
    assert not job.without({("metric", 1, "a", "tpe + none", s) for s in range(3)}).seeds
