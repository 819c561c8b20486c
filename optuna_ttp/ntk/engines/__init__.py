"""The engines: each turns a task into the kernel, or into its leading eigenpairs."""

from __future__ import annotations
