"""Benchmarks: scripts that anyone can rerun, with their raw results beside them."""

from __future__ import annotations
