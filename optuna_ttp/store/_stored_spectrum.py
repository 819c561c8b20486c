"""What is stored, without its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredSpectrum:
    """A line of :meth:`SpectrumStore.list`.

    Attributes:
        key:
            Names the row: 64 hexadecimal digits.
        fingerprint:
            The task's fingerprint.
        name:
            The task's name.
        settings:
            Engine, precision and truncation.
        n_samples:
            N.
        n_outputs:
            C.
        rank:
            The number of eigenpairs.
        compute_seconds:
            What it took to compute.
        created_at:
            When, in ISO 8601, UTC.
        n_bytes:
            Size of the stored arrays.
        used_at:
            When it was last read, within a minute, in ISO 8601, UTC, by the database's clock.
            :obj:`None` where no version that writes this down has read it yet.
        in_folder:
            Whether the arrays lie in the object folder instead of the database.
        provenance:
            The spectrum's metadata: package, PyTorch, device, precision, engine, and what else
            it knows. Empty for those that were stored by the first schema.
    """

    key: str
    fingerprint: str
    name: str
    settings: dict[str, Any]
    n_samples: int
    n_outputs: int
    rank: int
    compute_seconds: float
    created_at: str
    n_bytes: int
    used_at: str | None
    in_folder: bool
    provenance: dict[str, Any]
