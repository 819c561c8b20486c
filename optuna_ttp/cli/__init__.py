"""The ``optuna-ttp`` command."""

from __future__ import annotations

from optuna_ttp.cli._main import main


__all__ = [
    "main",
]
