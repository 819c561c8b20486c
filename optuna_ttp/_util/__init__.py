"""Argument checks, warnings and exceptions, which need no other package of optuna_ttp."""

from __future__ import annotations
