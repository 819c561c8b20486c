"""The revisions of the store's tables, as Alembic wants them."""

from __future__ import annotations
