"""Plots with Matplotlib. Each draws into ``ax`` and returns it; a new figure by default."""

from __future__ import annotations

from optuna_ttp.visualization.matplotlib._decisions import plot_decisions
from optuna_ttp.visualization.matplotlib._predicted_vs_observed import plot_predicted_vs_observed
from optuna_ttp.visualization.matplotlib._value_over_time import plot_value_over_time


__all__ = [
    "plot_decisions",
    "plot_predicted_vs_observed",
    "plot_value_over_time",
]
