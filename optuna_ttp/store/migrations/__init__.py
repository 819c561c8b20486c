"""The revisions of the store's tables, in the layout that Alembic expects."""

from __future__ import annotations
