"""Plots of predictions and of what they saved. See :mod:`optuna_ttp.visualization.matplotlib`."""

from __future__ import annotations
