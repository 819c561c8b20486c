"""Plots of predictions and decisions. See :mod:`optuna_ttp.visualization.matplotlib`."""

from __future__ import annotations
