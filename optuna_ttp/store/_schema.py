"""The store's tables as this version has them; ``migrations`` holds the steps that lead here."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


HEAD = "0001"
"""The revision that these tables belong to."""
VERSION_TABLE = "ttp_alembic_version"
"""The table that holds the database's revision. A study's own is called ``alembic_version``."""

metadata = sa.MetaData()

# MySQL's plain BLOB and TEXT end at 64 KiB.
_BLOB = sa.LargeBinary().with_variant(sa.LargeBinary(2**32 - 1), "mysql", "mariadb")
_LONG_TEXT = sa.Text().with_variant(sa.Text(2**32 - 1), "mysql", "mariadb")

spectra = sa.Table(
    "ttp_spectra",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False, index=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("n_samples", sa.Integer, nullable=False),
    sa.Column("n_outputs", sa.Integer, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("compute_seconds", sa.Float, nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("provenance", _LONG_TEXT, nullable=False),
    # Names the rows in ttp_chunks; names none if the arrays lie in the object folder.
    sa.Column("blob", sa.String(32), nullable=False),
    sa.Column("in_folder", sa.Boolean, nullable=False),
    sa.Column("n_bytes", sa.BigInteger, nullable=False),
    sa.Column("used_at", sa.Double, nullable=False, index=True),
)
chunks = sa.Table(
    "ttp_chunks",
    metadata,
    sa.Column("blob", sa.String(32), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("data", _BLOB, nullable=False),
)
leases = sa.Table(
    "ttp_leases",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("holder", sa.String(255), nullable=False),
    sa.Column("acquired_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)
checkpoints = sa.Table(
    "ttp_checkpoints",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("blob", sa.String(32), nullable=False),
    sa.Column("n_bytes", sa.BigInteger, nullable=False),
    sa.Column("saved_at", sa.Double, nullable=False),
)
learned = sa.Table(
    "ttp_learned",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False, index=True),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("payload", _LONG_TEXT, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    # Distinguishes a worker's change whose commit was not answered from another worker's.
    sa.Column("writer", sa.String(32), nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)
quarantine = sa.Table(
    "ttp_quarantine",
    metadata,
    sa.Column("blob", sa.String(32), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("n_bytes", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("quarantined_at", sa.Double, nullable=False),
)


class DatabaseTime(FunctionElement[float]):
    """Seconds since 1970 by the database's clock, the one that all workers share."""

    type = sa.Double()
    inherit_cache = True


@compiles(DatabaseTime, "sqlite")
def _sqlite_time(element: DatabaseTime, compiler: Any, **kwargs: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(DatabaseTime, "postgresql")
def _postgresql_time(element: DatabaseTime, compiler: Any, **kwargs: Any) -> str:
    # Not now(), which stands still during a transaction.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(DatabaseTime, "mysql")
@compiles(DatabaseTime, "mariadb")
def _mysql_time(element: DatabaseTime, compiler: Any, **kwargs: Any) -> str:
    return "(UNIX_TIMESTAMP(SYSDATE(6)) + 0E0)"
