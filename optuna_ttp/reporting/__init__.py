"""What was predicted, decided and paid for every trial, and what that saved."""

from __future__ import annotations

from optuna_ttp.reporting._ledger import report
from optuna_ttp.reporting._report import Report


__all__ = [
    "Report",
    "report",
]
