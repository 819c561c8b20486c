"""JSON values learned of a task from its trials, which no worker overwrites without reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from datetime import timezone
import hashlib
import json
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from optuna_ttp._util.exceptions import LearnedConflictError
from optuna_ttp._util.exceptions import StoreError
from optuna_ttp.store._database import Database
from optuna_ttp.store._rules import RULES
from optuna_ttp.store._schema import DatabaseTime
from optuna_ttp.store._schema import learned


@dataclass(frozen=True)
class Learned:
    """A JSON value learned of a task, ``payload``; ``version`` counts its changes from 1.

    ``updated_at`` is the time of the last change in ISO 8601, UTC, by the database's clock.
    """

    payload: Any
    version: int
    updated_at: str


def get(
    database: Database, fingerprint: str, kind: str, settings: dict[str, Any]
) -> Learned | None:
    """Return the stored value, None if missing; see :meth:`SpectrumStore.get_learned`."""
    name = _name(fingerprint, kind, settings)
    query = sa.select(learned).where(learned.c.id == name)
    row = database.read(lambda connection: connection.execute(query).first())
    if row is None:
        return None
    try:
        payload = json.loads(row.payload)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"The value learned of the task {fingerprint[:12]}... must be JSON but got something "
            f"else ({type(error).__name__})."
        ) from None
    moment = datetime.fromtimestamp(row.updated_at, timezone.utc)
    return Learned(payload, row.version, moment.isoformat(timespec="milliseconds"))


def put(
    database: Database,
    fingerprint: str,
    kind: str,
    settings: dict[str, Any],
    payload: Any,
    version: int,
) -> int:
    """Store a value as ``version + 1`` and return that; see :meth:`SpectrumStore.put_learned`."""
    text = _json(payload)
    name = _name(fingerprint, kind, settings)
    writer = uuid4().hex
    values = {
        "payload": text,
        "version": version + 1,
        "writer": writer,
        "updated_at": DatabaseTime(),
    }
    key = {
        "id": name,
        "fingerprint": fingerprint,
        "kind": kind,
        "settings": json.dumps(settings, sort_keys=True),
    }

    def work(connection: sa.Connection) -> bool:
        here = learned.c.id == name
        update = sa.update(learned).where(here, learned.c.version == version).values(values)
        if version and connection.execute(update).rowcount == 1:
            return True
        last_writer = connection.execute(sa.select(learned.c.writer).where(here)).scalar()
        if last_writer is None and not version:
            connection.execute(sa.insert(learned).values(**key, **values))
            return True
        # They are equal if this function ran before, and the answer of its commit was lost.
        return last_writer == writer

    try:
        stored = database.write(work)
    except sa.exc.IntegrityError:
        stored = False
    if not stored:
        raise LearnedConflictError(
            f"The value learned of the task {fingerprint[:12]}... must have version {version} to "
            "be replaced but another worker has stored a newer one. Read it, merge and try again."
        )
    return version + 1


def update(
    database: Database,
    fingerprint: str,
    kind: str,
    settings: dict[str, Any],
    merge: Callable[[Any], Any],
) -> Learned:
    """Replace a value by ``merge`` of it; see :meth:`SpectrumStore.update_learned`."""
    for _ in range(RULES.learned_tries):
        current = get(database, fingerprint, kind, settings)
        merged = merge(None if current is None else current.payload)
        version = 0 if current is None else current.version
        try:
            put(database, fingerprint, kind, settings, merged, version)
        except LearnedConflictError:
            continue
        stored = get(database, fingerprint, kind, settings)
        if stored is not None:
            return stored
    raise LearnedConflictError(
        f"Could not merge the value learned of the task {fingerprint[:12]}... in "
        f"{RULES.learned_tries} tries, because other workers were faster. Try again later."
    )


def _name(fingerprint: str, kind: str, settings: dict[str, Any]) -> str:
    """Return the key of a row, 64 hexadecimal digits made of all that names a learned value.

    ValueError is raised if ``kind`` is empty or too long.
    """
    if not 0 < len(kind) <= 64:
        raise ValueError(f"kind must have 1 to 64 characters but got {len(kind)}.")
    text = json.dumps([fingerprint, kind, settings], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _json(payload: Any) -> str:
    """Return the payload as a JSON text; raise ValueError if it is not JSON, or too long."""
    try:
        text = json.dumps(payload, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"payload must be JSON but got something else: {error}.") from error
    if len(text) > RULES.learned_characters:
        raise ValueError(
            f"payload must have at most {RULES.learned_characters} characters of JSON but got "
            f"{len(text)}."
        )
    return text
