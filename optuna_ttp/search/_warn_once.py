"""Warnings that a study gives once, whichever half of the search notices the reason first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.warn import warn_caller
from optuna_ttp.study import state_of


if TYPE_CHECKING:
    from optuna import Study


class _Warnings(set[str]):
    """What a study was warned of already."""


def warn_once(study: Study, of: str, message: str, category: type[Warning]) -> None:
    """Warn a study of something, unless it was warned of it before in this process."""
    state = state_of(study)
    with state.lock:
        warnings = state.part(_Warnings)
        if of in warnings:
            return
        warnings.add(of)
    warn_caller(message, category)
