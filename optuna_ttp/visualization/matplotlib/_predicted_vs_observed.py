"""The plot of predicted against observed training time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.study import observed_steps
from optuna_ttp.study import prediction_of
from optuna_ttp.study import trials_of
from optuna_ttp.visualization.matplotlib._axes import label_plainly
from optuna_ttp.visualization.matplotlib._axes import resolve_axes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    import optuna

    from optuna_ttp.prediction import SearchPredictor


def plot_predicted_vs_observed(
    study: optuna.Study, predictor: SearchPredictor, *, ax: Axes | None = None
) -> Axes:
    """Plot predicted against observed steps to the target, one point for each finished trial.

    A trial has no point if no number of steps was predicted for it, if it did not record its
    training loss with :class:`~optuna_ttp.TrainingLog`, or if it did not reach the target.

    Example:
        >>> from optuna_ttp.visualization.matplotlib import plot_predicted_vs_observed
        >>> plot_predicted_vs_observed(study, predictor).figure.savefig("steps.png")

    Args:
        study:
            A study with a :class:`~optuna_ttp.TTPSampler` or a :class:`~optuna_ttp.TTPPruner`.
        predictor:
            The predictor of the sampler or the pruner, whose target counts.
        ax:
            Axes to draw into. A new figure by default.

    Returns:
        The axes.

    Raises:
        TypeError:
            If ``study`` is not a study of Optuna.
        ImportError:
            If Matplotlib is not installed.
    """
    ax = resolve_axes(ax, study)
    points = []
    for trial in trials_of(study):
        prediction = prediction_of(trial)
        if prediction is not None and np.isfinite(prediction.steps):
            points.append((prediction.steps, observed_steps(trial, predictor)))
    predicted, observed = np.array(points, dtype=float).reshape(-1, 2).T
    shown = np.isfinite(observed) & (observed > 0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    if shown.any():
        both = np.concatenate([predicted[shown], observed[shown]])
        ends = np.array([both.min() / 1.5, both.max() * 1.5])
        ax.plot(ends, ends, color="0.6", linewidth=1, label="equal")
        ax.fill_between(
            ends, ends / 1.25, ends * 1.25, color="0.9", linewidth=0, label="within a factor 1.25"
        )
        ax.plot(
            predicted[shown], observed[shown], "o", color="tab:blue", alpha=0.8, label="trials"
        )
        ax.legend()
    for axis in (ax.xaxis, ax.yaxis):
        label_plainly(axis)
    ax.set_xlabel("Predicted steps to the target")
    ax.set_ylabel("Observed steps to the target")
    ax.set_title("Predicted against observed training time")
    return ax
