"""The engines: each computes the kernel of a task, or the kernel's leading eigenpairs."""

from __future__ import annotations
