"""Arrays in chunks, leases, checkpoints, what was learned, quarantine.

Keys change, too: they name the settings that differ from the defaults, so that a later version may
know more settings without losing what is stored. The arrays stay as they are, byte for byte.

MySQL commits every change of a table on its own. Each step can therefore be done again: a
migration that was killed is finished by the next process that opens the store.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
import uuid

from alembic import op
import sqlalchemy as sa


revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_CHUNK = 2 * 2**20
_BLOB = sa.LargeBinary().with_variant(sa.LargeBinary(2**32 - 1), "mysql", "mariadb")
_LONG_TEXT = sa.Text().with_variant(sa.Text(2**32 - 1), "mysql", "mariadb")
# As they were when this revision was written.
_DEFAULTS = {"engine": "exact", "dtype": "float32", "rank": None, "explained_trace": None}

_old = sa.table(
    "ttp_spectra",
    *[
        sa.column(name)
        for name in (
            "key",
            "fingerprint",
            "name",
            "settings",
            "n_samples",
            "n_outputs",
            "rank",
            "compute_seconds",
            "created_at",
            "checksum",
        )
    ],
    sa.column("data", sa.LargeBinary),
)


def upgrade() -> None:
    """Make the new tables and move the rows of the old one."""
    connection = op.get_bind()
    for name, columns in _tables().items():
        if name not in _table_names(connection):
            op.create_table(name, *columns)
    if "blob" not in _column_names(connection):
        _replace(connection)
    indexes = {index["name"] for index in sa.inspect(connection).get_indexes("ttp_spectra")}
    for column in ("fingerprint", "used_at"):
        if f"ix_ttp_spectra_{column}" not in indexes:
            op.create_index(f"ix_ttp_spectra_{column}", "ttp_spectra", [column])


def _replace(connection: sa.Connection) -> None:
    if "ttp_spectra_new" not in _table_names(connection):
        op.create_table("ttp_spectra_new", *_new_columns())
    if "ttp_spectra" in _table_names(connection):
        _move(connection)
        op.drop_table("ttp_spectra")
    op.rename_table("ttp_spectra_new", "ttp_spectra")


def _table_names(connection: sa.Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names())


def _column_names(connection: sa.Connection) -> set[str]:
    if "ttp_spectra" not in _table_names(connection):
        return set()
    return {column["name"] for column in sa.inspect(connection).get_columns("ttp_spectra")}


def _move(connection: sa.Connection) -> None:
    new = sa.Table("ttp_spectra_new", sa.MetaData(), autoload_with=connection)
    chunks = sa.table(
        "ttp_chunks", sa.column("blob"), sa.column("position"), sa.column("data", sa.LargeBinary)
    )
    # One row at a time: together they may be larger than memory.
    for key in connection.execute(sa.select(_old.c.key)).scalars().all():
        row = connection.execute(sa.select(_old).where(_old.c.key == key)).mappings().one()
        moved: dict[str, Any] = {k: v for k, v in row.items() if k != "data"}
        moved["key"] = _key(row["fingerprint"], json.loads(row["settings"]))
        present = sa.select(new.c.key).where(new.c.key == moved["key"])
        if connection.execute(present).first() is not None:
            continue
        blob = uuid.uuid4().hex
        for position, start in enumerate(range(0, len(row["data"]), _CHUNK)):
            piece = bytes(row["data"][start : start + _CHUNK])
            values = {"blob": blob, "position": position, "data": piece}
            connection.execute(sa.insert(chunks).values(values))
        moved.update(
            provenance="{}", blob=blob, in_folder=False, n_bytes=len(row["data"]), used_at=0.0
        )
        connection.execute(sa.insert(new).values(moved))


def _key(fingerprint: str, settings: dict[str, Any]) -> str:
    changed = {k: v for k, v in settings.items() if v != _DEFAULTS.get(k)}
    text = json.dumps([fingerprint, changed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _new_columns() -> list[sa.Column[Any]]:
    return [
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
    ]


def _tables() -> dict[str, list[sa.Column[Any]]]:
    return {
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
            sa.Column("fingerprint", sa.String(64), nullable=False, index=True),
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
