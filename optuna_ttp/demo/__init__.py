"""The demo: the same search on a real network twice, without and with predictions."""

from __future__ import annotations

from optuna_ttp.demo._demo import compare
from optuna_ttp.demo._demo import pretrain
from optuna_ttp.demo._demo import run
from optuna_ttp.demo._demo import Search
from optuna_ttp.demo._demo import train


__all__ = [
    "Search",
    "compare",
    "pretrain",
    "run",
    "train",
]
