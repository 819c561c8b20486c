"""Predicted against real training."""

from __future__ import annotations
