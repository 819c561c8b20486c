"""Callbacks that record a trial's training loss in the trainers of other libraries.

Each module needs the library that it is for, and is imported by its own name:
``from optuna_ttp.integrations.transformers import TrainingLogCallback``, or
``optuna_ttp.integrations.lightning``.
"""

from __future__ import annotations


__all__ = []
