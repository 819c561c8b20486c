"""The description of a stored spectrum, without its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredSpectrum:
    """An entry of :meth:`SpectrumStore.list`: a stored spectrum without its arrays.

    The ``key`` names the row (64 hexadecimal digits), ``n_bytes`` is the length of the stored
    arrays, ``created_at`` and ``used_at`` (within a minute) are times in ISO 8601, UTC,
    ``in_folder`` tells whether the arrays lie in the object folder, and ``provenance`` holds the
    fields of the spectrum's :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
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
