"""Products ``J (J^T V)`` by passes over the data that compute rows of the Jacobian in batches."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch
from tqdm import tqdm

from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._rules import PAIRS
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.ntk.jacobian._separable import Separated
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.layers._factors import chunked_product
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._rule import Contribution


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


class Passes:
    """A context in which passes over the data of a task share the claims, layout and hooks.

    ``lifts`` are those of :func:`~optuna_ttp.ntk.jacobian._prepare.lifting`.
    """

    def __init__(
        self, task: FineTuningTask, settings: EngineSettings, lifts: Mapping[str, int]
    ) -> None:
        self._task, self._settings, self._lifts = task, settings, lifts
        self._device, self._dtype = settings.device, settings.dtype

    def __enter__(self) -> Passes:
        task, device, dtype = self._task, self._device, self._dtype
        with ExitStack() as stack:
            reference = task.initial_outputs(device, dtype)
            self._frozen: FrozenModel = stack.enter_context(task.frozen(device, dtype))
            check_singles(task, self._frozen, reference, self._settings)
            preparation = prepare(task, self._frozen, self._settings, self._lifts)
            self._layout = _layout_of_factors(task, self._frozen, preparation, dtype)
            self._preparation = preparation
            self._tape = stack.enter_context(preparation.claims.tape(self._frozen).attached())
            n = task.n_samples
            making = preparation.bytes_per_sample + self._layout.bytes_per_sample
            batch = max(1, min(PAIRS.max_batch, -(-n // 2), PAIRS.batch_bytes // max(1, making)))
            self._batch_size = batch
            self._reference = reference
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def images(
        self, vectors: torch.Tensor, *, training: bool = True, others: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return ``J (J^T V)`` for ``V`` of shape ``(N C, p)``, in double precision.

        The result has that product with ``training``, then ``J_v (J^T V)``, of shape ``(N_v C,
        p)``, with ``others``. If ``J^T V`` takes more than half of the memory budget, the
        parameters are cut into groups with two passes each.
        """
        wanted: list[tuple[FineTuningTask, NDArray[np.float64]]] = []
        if training:
            wanted.append((self._task, self._reference))
        if others:
            held_out = self._task.validation
            assert held_out is not None
            wanted.append((held_out, held_out.initial_outputs(self._device, self._dtype)))
        n_vectors = vectors.shape[1]
        groups: list[list[str]] = [[]]
        held = 0
        for p in self._layout.parameters:
            n_bytes = p.n_weights * n_vectors * vectors.element_size()
            if groups[-1] and held + n_bytes > self._settings.max_memory // 2:
                groups.append([])
                held = 0
            groups[-1].append(p.name)
            held += n_bytes
        totals = tuple(
            torch.zeros((task.n_samples * task.n_outputs, n_vectors), dtype=torch.float64)
            for task, _ in wanted
        )
        n_read = self._task.n_samples + sum(task.n_samples for task, _ in wanted)
        with self._bar(len(groups) * n_read) as bar:
            for names in groups:
                products = self._products(vectors, frozenset(names), bar)
                for total, (task, reference) in zip(totals, wanted, strict=True):
                    self._add_images(total, products, task, reference, bar)
        return totals

    def _products(
        self, vectors: torch.Tensor, names: frozenset[str], bar: tqdm[Any]
    ) -> dict[str, torch.Tensor]:
        """Return ``J^T V``, ``(n_weights, p)``, of the parameters ``names``, by name."""
        n_outputs = self._task.n_outputs
        n_weights = {p.name: p.n_weights for p in self._layout.parameters}
        products: dict[str, torch.Tensor] = {}
        for first, state in self._states(self._task, self._reference, bar):
            chosen = vectors[first * n_outputs : (first + state.n_samples) * n_outputs]
            for name, gradient in self._gradients(state):
                if name not in names:
                    continue
                if name not in products:
                    products[name] = vectors.new_zeros((n_weights[name], vectors.shape[1]))
                total = products[name]
                if isinstance(gradient, Factors) and gradient.expand is None:
                    total += _table_product(gradient, chosen)
                elif isinstance(gradient, Separated):
                    total += gradient.product(chosen)
                else:
                    total.addmm_(_rows(gradient).flatten(0, 1).T, chosen)
        return products

    def _add_images(
        self,
        total: torch.Tensor,
        products: dict[str, torch.Tensor],
        task: FineTuningTask,
        reference: NDArray[np.float64],
        bar: tqdm[Any],
    ) -> None:
        """Add ``J W``, ``(N C, p)``, to ``total`` for ``products`` ``W = J^T V`` by parameter."""
        n_outputs = task.n_outputs
        for first, state in self._states(task, reference, bar):
            rows = slice(first * n_outputs, (first + state.n_samples) * n_outputs)
            for name, gradient in self._gradients(state):
                if name not in products:
                    continue
                if isinstance(gradient, Factors) and gradient.expand is None:
                    part = _table_image(gradient, products[name])
                elif isinstance(gradient, Separated):
                    part = gradient.image(products[name])
                else:
                    part = chunked_product(_rows(gradient).flatten(0, 1), products[name].T)
                total[rows] += part.double().cpu()

    def _states(
        self,
        task: FineTuningTask,
        reference: NDArray[np.float64],
        bar: tqdm[Any],
    ) -> Iterator[tuple[int, BlockState]]:
        """Yield the index of each batch's first sample, and the batch's stored Jacobian."""
        reader = SampleReader(
            task,
            self._frozen,
            self._preparation.claims,
            self._tape,
            self._settings,
            batch_size=self._batch_size,
            reference=reference,
        )
        for first in range(0, task.n_samples, self._batch_size):
            last = min(first + self._batch_size, task.n_samples)
            # Products with the weights cost less from rows than from factors.
            state, _ = reader.read(self._layout, first, last, weight_outputs=False)
            yield first, state
            bar.update(last - first)

    def _gradients(self, state: BlockState) -> Iterator[tuple[str, Contribution | Separated]]:
        """Yield the name and the gradient of each parameter in a state."""
        rows = state.rows.unflatten(0, (state.n_samples, self._task.n_outputs))
        n_weights = {p.name: p.n_weights for p in self._layout.parameters}
        for name, offset in self._layout.offsets.items():
            yield name, rows[..., offset : offset + n_weights[name]]
        yield from state.factors.items()
        yield from state.separated.items()

    def _bar(self, total: int) -> tqdm[Any]:
        """Return a progress bar for ``total`` samples, hidden if the settings say so."""
        return tqdm(
            total=total,
            desc="Multiplied samples",
            unit="sample",
            disable=None if self._settings.show_progress_bar else True,
            leave=False,
        )


def _layout_of_factors(
    task: FineTuningTask, frozen: FrozenModel, preparation: Preparation, dtype: torch.dtype
) -> Layout:
    """Return a layout that stores factors, of which rows are computed when they are projected."""
    parameters = tuple(
        replace(p, method="ghost" if shape.is_table else "panels")
        if (shape := preparation.claims.shapes[p.name]) is not None and p.method != "separable"
        else p
        for p in preparation.layout.parameters
    )
    offsets: dict[str, int] = {}
    column = 0
    for p in parameters:
        if p.method == "rows":
            offsets[p.name] = column
            column += p.n_weights
    return Layout(parameters, column, offsets, ())


def _rows(gradient: Contribution | Separated) -> torch.Tensor:
    """Return the rows of a gradient, of shape ``(B, C, p)``."""
    if isinstance(gradient, Separated):
        return gradient.gradient()
    return gradient.rows() if isinstance(gradient, Factors) else gradient


def _table_product(factors: Factors, vectors: torch.Tensor) -> torch.Tensor:
    """Return ``G^T V`` ``(p, n)``, ``p`` all weights of a lookup table; ``V`` is ``(B C, n)``."""
    width = factors.shape[2]
    total = vectors.new_zeros((factors.n_rows, width, vectors.shape[1]))
    for ids, cotangents in zip(factors.sources, factors.cotangents, strict=True):
        d = cotangents[:, 0]
        chosen = vectors.unflatten(0, (len(d), -1))
        values = torch.einsum("bcos,bcn->bson", d, chosen)
        total.index_add_(0, ids.flatten(), values.flatten(0, 1))
    return total.flatten(0, 1)


def _table_image(factors: Factors, weights: torch.Tensor) -> torch.Tensor:
    """Return ``G W`` of a table, of shape ``(B C, n)``, for ``W`` of shape ``(p, n)``."""
    width = factors.shape[2]
    matrices = weights.unflatten(0, (factors.n_rows, width))
    parts = [
        torch.einsum("bcos,bson->bcn", cotangents[:, 0], matrices[ids])
        for ids, cotangents in zip(factors.sources, factors.cotangents, strict=True)
    ]
    return torch.stack(parts).sum(0).flatten(0, 1)
