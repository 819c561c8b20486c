"""Plots with Matplotlib."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
import numpy as np
import optuna
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import TrainingLog
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.visualization.matplotlib import plot_decisions
from optuna_ttp.visualization.matplotlib import plot_predicted_vs_observed
from optuna_ttp.visualization.matplotlib import plot_value_over_time
from tests.every_decision import study_with_every_decision
from tests.models import small_predictor
from tests.studies import quick_predictor


def _study() -> optuna.Study:
    predictor = small_predictor()
    study = optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(max_steps=200), seed=0),
        pruner=TTPPruner(predictor),
    )
    for rate in (1e-7, 0.05, 0.2, 1e4):
        study.enqueue_trial({"learning_rate": rate, "batch_size": 8, "momentum": 0.0})

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-8, 1e5, log=True)
        trial.suggest_categorical("batch_size", [8, 16])
        trial.suggest_float("momentum", 0.0, 0.9)
        if trial.should_prune():
            raise optuna.TrialPruned
        with TrainingLog(trial) as log:
            for step in range(300):
                log.step(predictor.initial_loss * float(np.exp(-rate * step)))
        return rate

    study.optimize(objective, n_trials=4)
    return study


def test_predicted_against_observed_has_a_point_for_each_trial_that_reached_the_target() -> None:
    ax = plot_predicted_vs_observed(_study(), small_predictor(), ax=Figure().subplots())
    (points,) = [line for line in ax.lines if line.get_label() == "trials"]
    assert np.asarray(points.get_xydata()).shape == (2, 2)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_decisions_are_grouped_by_what_was_decided_and_why() -> None:
    ax = plot_decisions(_study(), ax=Figure().subplots())
    labels = sorted(str(line.get_label()) for line in ax.lines)
    assert labels == ["ran (2)", "skipped: diverges (1)", "skipped: too slow (1)"]


def test_decisions_of_every_kind_are_drawn() -> None:
    study, counts = study_with_every_decision()
    ax = plot_decisions(study, ax=Figure().subplots())
    slow = sum(counts[f"skipped {kind}"] for kind in ("budget", "cost", "study_budget"))
    # Trials without a prediction have no place in the plane.
    assert [line.get_label() for line in ax.lines] == [
        f"ran ({counts['ran']})",
        f"ran despite its prediction ({counts['despite']})",
        f"stopped while it ran ({counts['stopped']})",
        f"skipped: diverges ({counts['skipped diverges']})",
        f"skipped: too slow ({slow})",
        f"no decision ({counts['undecided']})",
    ]
    n_points = sum(len(np.asarray(line.get_xdata())) for line in ax.lines)
    assert n_points == sum(counts.values()) - counts["unknown"]


def test_steps_of_trials_with_every_decision_are_drawn_where_some_were_predicted() -> None:
    study, _ = study_with_every_decision()
    ax = plot_predicted_vs_observed(study, quick_predictor(), ax=Figure().subplots())
    (points,) = [line for line in ax.lines if line.get_label() == "trials"]
    expected = [
        trial
        for trial in study.trials
        if trial.state.is_finished()
        and "losses" in trial.user_attrs.get("ttp:curve", {})
        and trial.user_attrs["ttp:record"]["prediction"]["outcome"] == "converges"
    ]
    assert len(np.asarray(points.get_xydata())) == len(expected) > 0


def test_value_over_time_is_drawn_with_trials_of_every_decision() -> None:
    study, _ = study_with_every_decision()
    ax = plot_value_over_time({"all": study}, ax=Figure().subplots())
    (line,) = ax.lines
    assert np.asarray(line.get_xydata())[0].tolist() == [3.0, 0.5]


def test_value_over_time_has_a_line_for_each_study_that_starts_after_its_head_start() -> None:
    study = _study()
    ax = plot_value_over_time(
        {"a": study, "b": study}, head_start={"b": 100.0}, end=200.0, ax=Figure().subplots()
    )
    first, second = ax.lines
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert np.asarray(second.get_xdata())[0] >= 100.0 > np.asarray(first.get_xdata())[0]
    assert np.asarray(first.get_xdata())[-1] == 200.0


def test_the_value_of_a_study_with_several_objectives_is_refused_by_name() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    with pytest.raises(ValueError, match="studies must have one objective but 'both' has 2"):
        plot_value_over_time({"both": study}, ax=Figure().subplots())


def test_a_logarithmic_axis_of_values_has_plain_numbers() -> None:
    ax = Figure().subplots()
    ax.set_yscale("log")
    plot_value_over_time({"all": study_with_every_decision()[0]}, ax=ax)
    ax.set_ylim(0.1, 1.0)
    assert {"0.1", "0.2", "0.5", "1"} <= {tick.get_text() for tick in ax.get_yticklabels()}


def test_an_empty_study_gives_empty_plots() -> None:
    study = optuna.create_study()
    for ax in (
        plot_predicted_vs_observed(study, small_predictor(), ax=Figure().subplots()),
        plot_decisions(study, ax=Figure().subplots()),
        plot_value_over_time({"empty": study}, ax=Figure().subplots()),
    ):
        assert not [line for line in ax.lines if len(np.asarray(line.get_xdata()))]


def test_what_is_no_study_is_named() -> None:
    study: Any = "study"
    for plot in (
        plot_decisions,
        lambda one: plot_predicted_vs_observed(one, small_predictor()),
        lambda one: plot_value_over_time({"a": one}),
    ):
        with pytest.raises(TypeError, match="study must be a Study but got 'study'"):
            plot(study)
    with pytest.raises(TypeError, match="studies must be a Mapping but got <optuna"):
        plot_value_over_time(optuna.create_study())  # type: ignore[arg-type]


def test_without_axes_a_new_figure_is_made() -> None:
    from matplotlib import pyplot

    try:
        assert plot_decisions(_study()).figure is not None
    finally:
        pyplot.close("all")
