"""Spectra in a database, so that each is computed once, by one of many workers."""

from __future__ import annotations

from optuna_ttp.store._checkpoint import Checkpoint
from optuna_ttp.store._housekeeping import Pruning
from optuna_ttp.store._housekeeping import Verification
from optuna_ttp.store._learned import Learned
from optuna_ttp.store._spectrum_store import SpectrumStore
from optuna_ttp.store._stored_spectrum import StoredSpectrum


__all__ = [
    "Checkpoint",
    "Learned",
    "Pruning",
    "SpectrumStore",
    "StoredSpectrum",
    "Verification",
]
