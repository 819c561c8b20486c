"""The demo: the same search on a real network twice, without and with predictions.

A small convolutional network is pretrained on the digits 0 to 4 of scikit-learn's bundled set and
fine-tuned to 5 to 9. Everything runs on the CPU and is seeded, but the number of trials of a
search in a given time depends on the machine.
"""

from __future__ import annotations

from optuna_ttp.demo._demo import compare
from optuna_ttp.demo._demo import run
from optuna_ttp.demo._search import Search
from optuna_ttp.demo._training import pretrain
from optuna_ttp.demo._training import train


__all__ = [
    "Search",
    "compare",
    "pretrain",
    "run",
    "train",
]
