"""Whether the store is as trustworthy as the database under it, and what it costs."""

from __future__ import annotations
