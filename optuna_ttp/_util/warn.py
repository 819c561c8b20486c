"""Warnings that point to the user's own line."""

from __future__ import annotations

import sys
import warnings


_PACKAGE = __name__.partition(".")[0]


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of this package whose call led here, however many frames ago."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] != _PACKAGE:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
