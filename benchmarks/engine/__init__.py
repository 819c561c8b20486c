"""Cost of the Jacobian engines."""

from __future__ import annotations
