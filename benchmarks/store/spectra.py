"""Spectra of a given size, and the servers that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import hashlib
from pathlib import Path
import tempfile

import numpy as np

from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import SpectrumMetadata
from optuna_ttp.task import Loss
from tests.servers import PostgreSQL


def synthetic(n_bytes: int, name: str = "synthetic", seed: int = 0) -> Spectrum:
    """A spectrum whose eigenvectors have about so many bytes, of random numbers."""
    n_outputs, rank = 10, 1024
    n_samples = max(1, n_bytes // (4 * rank * n_outputs))
    generator = np.random.default_rng(seed)
    rows = n_samples * n_outputs
    return Spectrum(
        eigenvalues=np.linspace(2, 1, rank),
        eigenvectors=generator.standard_normal((rows, rank), dtype=np.float32),
        trace=1e4,
        initial_outputs=generator.standard_normal((n_samples, n_outputs)),
        targets=generator.integers(n_outputs, size=n_samples),
        loss=Loss("cross_entropy"),
        throughput=None,
        metadata=SpectrumMetadata(
            fingerprint=hashlib.sha256(f"{name} {seed}".encode()).hexdigest(),
            name=name,
            engine="exact",
            dtype="float32",
            device="cpu",
            n_parameters=1000,
            compute_seconds=1.0,
            created_at="2026-11-24T00:00:00+00:00",
            package_version="0.1.0",
            torch_version="2.13.0",
        ),
    )


@contextmanager
def databases(kinds: list[str]) -> Iterator[dict[str, str]]:
    """URLs of empty databases by their kind, gone afterwards; PostgreSQL waits for its disk."""
    server = PostgreSQL(durable=True) if "postgresql" in kinds else None
    with tempfile.TemporaryDirectory(prefix="ttp-store-") as folder:
        urls = {"sqlite": f"sqlite:///{Path(folder) / 'ttp.db'}"}
        if server is not None:
            urls["postgresql"] = server.new_database()
        try:
            yield {kind: urls[kind] for kind in kinds}
        finally:
            if server is not None:
                server.close()
