"""The description of a stored spectrum, without its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredSpectrum:
    """A line of :meth:`SpectrumStore.list`: a stored spectrum without its arrays.

    Attributes:
        key:
            The name of the row, 64 hexadecimal digits.
        fingerprint:
            The task's fingerprint.
        name:
            The task's name.
        settings:
            Engine, precision and truncation.
        n_samples:
            The number N of samples.
        n_outputs:
            The number C of outputs.
        rank:
            The number of eigenpairs.
        compute_seconds:
            Seconds that the computation took.
        created_at:
            The time of the computation in ISO 8601, UTC.
        n_bytes:
            Bytes of the stored arrays.
        used_at:
            The time it was last read, within a minute, in ISO 8601, UTC, by the database's clock.
        in_folder:
            Whether the arrays lie in the object folder instead of the database.
        provenance:
            The fields of the spectrum's :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
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
    used_at: str
    in_folder: bool
    provenance: dict[str, Any]
