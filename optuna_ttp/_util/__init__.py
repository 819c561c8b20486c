"""Argument checks, warnings and exceptions: what knows no type of the domain."""

from __future__ import annotations
