"""Alembic's entry point: it runs the revisions in the transaction that the store has opened."""

from __future__ import annotations

from alembic import context

from optuna_ttp.store._schema import metadata
from optuna_ttp.store._schema import VERSION_TABLE


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
