"""Searches with and without predictions."""

from __future__ import annotations
