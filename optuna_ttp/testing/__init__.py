"""A conformance suite for pruners."""

from __future__ import annotations

from optuna_ttp.testing._pruner_test_case import PrunerTestCase


__all__ = [
    "PrunerTestCase",
]
