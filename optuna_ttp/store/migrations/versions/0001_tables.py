"""The tables of version 1.

MySQL commits every change of a table on its own. Each step can therefore be done again: a
migration that was killed is finished by the next process that opens the store.
"""

from __future__ import annotations

from typing import Any

from alembic import op
import sqlalchemy as sa


revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# MySQL's plain BLOB and TEXT end at 64 KiB.
_BLOB = sa.LargeBinary().with_variant(sa.LargeBinary(2**32 - 1), "mysql", "mariadb")
_LONG_TEXT = sa.Text().with_variant(sa.Text(2**32 - 1), "mysql", "mariadb")
_INDEXES = {"ttp_spectra": ("fingerprint", "used_at"), "ttp_learned": ("fingerprint",)}


def upgrade() -> None:
    """Make the tables and indexes that are not there yet."""
    inspector = sa.inspect(op.get_bind())
    present = set(inspector.get_table_names())
    for name, columns in _tables().items():
        if name not in present:
            op.create_table(name, *columns)
    for table, indexed in _INDEXES.items():
        known = {i["name"] for i in inspector.get_indexes(table)} if table in present else set()
        for column in indexed:
            if f"ix_{table}_{column}" not in known:
                op.create_index(f"ix_{table}_{column}", table, [column])


def _tables() -> dict[str, list[sa.Column[Any]]]:
    return {
        "ttp_spectra": [
            sa.Column("key", sa.String(64), primary_key=True),
            sa.Column("fingerprint", sa.String(64), nullable=False),
            sa.Column("name", sa.String(255), nullable=False),
            sa.Column("settings", sa.Text, nullable=False),
            sa.Column("n_samples", sa.Integer, nullable=False),
            sa.Column("n_outputs", sa.Integer, nullable=False),
            sa.Column("rank", sa.Integer, nullable=False),
            sa.Column("compute_seconds", sa.Float, nullable=False),
            sa.Column("created_at", sa.String(32), nullable=False),
            sa.Column("checksum", sa.String(64), nullable=False),
            sa.Column("provenance", _LONG_TEXT, nullable=False),
            sa.Column("blob", sa.String(32), nullable=False),
            sa.Column("in_folder", sa.Boolean, nullable=False),
            sa.Column("n_bytes", sa.BigInteger, nullable=False),
            sa.Column("used_at", sa.Double, nullable=False),
        ],
        "ttp_chunks": [
            sa.Column("blob", sa.String(32), primary_key=True),
            sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("data", _BLOB, nullable=False),
        ],
        "ttp_leases": [
            sa.Column("key", sa.String(64), primary_key=True),
            sa.Column("owner", sa.String(32), nullable=False),
            sa.Column("holder", sa.String(255), nullable=False),
            sa.Column("acquired_at", sa.Double, nullable=False),
            sa.Column("expires_at", sa.Double, nullable=False),
        ],
        "ttp_checkpoints": [
            sa.Column("key", sa.String(64), primary_key=True),
            sa.Column("name", sa.String(255), primary_key=True),
            sa.Column("blob", sa.String(32), nullable=False),
            sa.Column("n_bytes", sa.BigInteger, nullable=False),
            sa.Column("saved_at", sa.Double, nullable=False),
        ],
        "ttp_learned": [
            sa.Column("id", sa.String(64), primary_key=True),
            sa.Column("fingerprint", sa.String(64), nullable=False),
            sa.Column("kind", sa.String(64), nullable=False),
            sa.Column("settings", sa.Text, nullable=False),
            sa.Column("payload", _LONG_TEXT, nullable=False),
            sa.Column("version", sa.Integer, nullable=False),
            sa.Column("writer", sa.String(32), nullable=False),
            sa.Column("updated_at", sa.Double, nullable=False),
        ],
        "ttp_quarantine": [
            sa.Column("blob", sa.String(32), primary_key=True),
            sa.Column("fingerprint", sa.String(64), nullable=False),
            sa.Column("name", sa.String(255), nullable=False),
            sa.Column("settings", sa.Text, nullable=False),
            sa.Column("n_bytes", sa.BigInteger, nullable=False),
            sa.Column("reason", sa.Text, nullable=False),
            sa.Column("quarantined_at", sa.Double, nullable=False),
        ],
    }
