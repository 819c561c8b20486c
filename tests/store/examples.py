"""Small tasks and spectra that the tests of the store share."""

from __future__ import annotations

from collections.abc import Callable
import copy
from dataclasses import replace
import hashlib
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch

from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.store._database import Database
from optuna_ttp.store._schema import leases
from optuna_ttp.store._schema import spectra
from optuna_ttp.task import FineTuningTask
from tests.cases import spectrum
from tests.models import mlp
from tests.models import vectors


class Counting:
    """A task that counts how often its model runs."""

    def __init__(self, seed: int = 0, name: str | None = None) -> None:
        self.n_calls = 0
        self.task = FineTuningTask(mlp(seed=seed), vectors(5), forward=self._forward, name=name)
        self.n_calls = 0

    @staticmethod
    def _plain(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = model(x)
        return outputs

    @property
    def _forward(self) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
        calls = self

        def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            calls.n_calls += 1
            return Counting._plain(model, x)

        return forward


def assert_equal(first: Spectrum, second: Spectrum) -> None:
    np.testing.assert_array_equal(first.eigenvalues, second.eigenvalues)
    np.testing.assert_array_equal(first.eigenvectors, second.eigenvectors)
    assert first.metadata == second.metadata


QUICK: dict[str, Any] = {"measure_speed": False, "probe": False, "show_progress_bar": False}


# Built once: a model built while another thread runs one may draw other weights, because torch's
# global generator is shared by all threads.
_MODEL = mlp()


def small_task(before: Callable[[], None] | None = None) -> FineTuningTask:
    """A small task, which does something whenever its model runs."""
    task = FineTuningTask(copy.deepcopy(_MODEL), vectors(5))
    if before is not None:
        # A hook is no part of the fingerprint.
        task.model.register_forward_pre_hook(lambda model, inputs: before())
    return task


def holders(url: str) -> list[str]:
    database = Database(url)
    return list(database.read(lambda c: c.execute(sa.select(leases.c.key)).scalars().all()))


def end_leases(url: str) -> None:
    """As if their owners had died long ago."""
    Database(url).write(lambda c: c.execute(sa.update(leases).values(expires_at=1.0)))


def named(name: str) -> Spectrum:
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    metadata = replace(spectrum().metadata, name=name, fingerprint=fingerprint)
    return replace(spectrum(), metadata=metadata)


def fill(url: str, names: str) -> tuple[SpectrumStore, int]:
    """Store spectra of one length, last used in the order of their names; the length, too."""
    store = SpectrumStore(url)
    for name in names:
        store.put(named(name), dtype="float64")

    def use(connection: sa.Connection) -> None:
        for moment, name in enumerate(names, 1):
            named = sa.update(spectra).where(spectra.c.name == name)
            connection.execute(named.values(used_at=float(moment)))

    Database(url).write(use)
    lengths = {stored.n_bytes for stored in store.list()}
    return store, max(lengths)


def names_of(store: SpectrumStore) -> str:
    return "".join(sorted(stored.name for stored in store.list()))
