"""The report of predictions, decisions, costs and savings of a study's trials."""

from __future__ import annotations

from optuna_ttp.reporting._ledger import report
from optuna_ttp.reporting._report import Report


__all__ = [
    "Report",
    "report",
]
