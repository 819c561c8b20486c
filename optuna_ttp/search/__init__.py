"""The sampler and the pruner."""

from __future__ import annotations

from optuna_ttp.search._pruner import TTPPruner
from optuna_ttp.search._sampler import TTPSampler


__all__ = [
    "TTPPruner",
    "TTPSampler",
]
