"""The sketching engine: a random projection of the Jacobian instead of the Jacobian.

Each sample is differentiated once, and its row for each output is projected to a few thousand
numbers, so that time and memory grow with N, not with its square. Small parameters are not
projected. Four independent groups of columns give an error bar, see
:mod:`optuna_ttp.ntk.engines._sketch_error`; two more passes refine the leading eigenpairs, see
:mod:`optuna_ttp.ntk.engines._refine`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch
from tqdm import tqdm

from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._choice import check_multipliers
from optuna_ttp.ntk.engines._projection import Projection
from optuna_ttp.ntk.engines._projection import SignFold
from optuna_ttp.ntk.engines._rules import N_GROUPS
from optuna_ttp.ntk.engines._rules import SKETCHES
from optuna_ttp.ntk.engines._self_check import check_row_norms
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.ntk.jacobian._separable import Separated
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.jacobian._state import row_products
from optuna_ttp.ntk.layers._factors import chunked_product
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._rule import Contribution
from optuna_ttp.ntk.layers._rules import PRODUCTS


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


@dataclass(frozen=True, eq=False)
class Sketch:
    """A projected Jacobian.

    ``exact`` are the columns of the small parameters, of shape ``(N C, e)``; ``groups`` are four
    independent projections of the others, of shape ``(N C, d / 4)``, with ``E[g g^T]`` equal to
    the others' part of the kernel. ``validation`` has the same five tensors for the validation
    samples, and is empty without any. ``weight_outputs`` are ``J w_0`` of shape ``(N, C)``; they
    and the trace are not approximated. With ``is_exact`` nothing is projected: groups are zero.
    """

    exact: torch.Tensor
    groups: tuple[torch.Tensor, ...]
    validation: tuple[torch.Tensor, ...]
    weight_outputs: NDArray[np.float64]
    trace: float
    is_exact: bool

    def features(self) -> torch.Tensor:
        """Return ``Z``, ``(N C, e + d)``, for which ``Z Z^T`` approximates the kernel."""
        return _joined(self.exact, self.groups)

    def validation_features(self) -> torch.Tensor | None:
        """Return ``Z``, ``(N_v C, e + d)``, of validation samples, or :obj:`None` without any."""
        return _joined(self.validation[0], self.validation[1:]) if self.validation else None


def _joined(exact: torch.Tensor, groups: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the columns of ``exact``, then those of the groups over the root of four."""
    return torch.cat([exact, *(len(groups) ** -0.5 * g for g in groups)], 1)


def sketch_jacobian(
    task: FineTuningTask,
    settings: EngineSettings,
    *,
    width: int,
    projection: Callable[..., Projection] = SignFold,
) -> Sketch:
    """Project the Jacobian of a task to rows of ``width`` numbers, a quarter in each group.

    Errors are those of :func:`~optuna_ttp.ntk.exact_kernel`; ValueError is also raised if a
    learning-rate multiplier is not one, or ``width`` not a positive multiple of four.
    """
    check_multipliers(task, "sketch")
    if width < N_GROUPS or width % N_GROUPS:
        raise ValueError(f"width must be a positive multiple of {N_GROUPS} but got {width!r}.")

    def run(lifts: Mapping[str, int]) -> Sketch:
        with Passes(task, settings, lifts) as passes:
            return passes.sketch(width, projection)

    return lifting(run)


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
            batch = max(
                1, min(SKETCHES.max_batch, -(-n // 2), SKETCHES.batch_bytes // max(1, making))
            )
            self._batch_size = batch
            self._reference = reference
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    @property
    def preparation(self) -> Preparation:
        """Return the claims, and the layout in which a batch is stored."""
        return replace(self._preparation, layout=self._layout)

    @property
    def batch_size(self) -> int:
        """Return the number of samples that go through the network together."""
        return self._batch_size

    def sketch_bytes(self, width: int) -> int:
        """Return the peak of memory for a sketch in bytes, on top of the model and the data."""
        task = self._task
        itemsize = self._dtype.itemsize
        exact, projected = _split({p.name: p.n_weights for p in self._layout.parameters}, width)
        n_held_out = 0 if task.validation is None else task.validation.n_samples
        n_rows = (task.n_samples + n_held_out) * task.n_outputs
        rows = n_rows * (sum(exact.values()) + width) * itemsize
        held = self._layout.bytes_per_sample + self._preparation.bytes_per_sample
        # There are copies of weights and of one gradient; a sign takes one byte.
        weights = 2 * task.n_parameters * itemsize + N_GROUPS * sum(projected.values())
        return rows + self._batch_size * held + 2 * PRODUCTS.scratch * itemsize + weights

    def sketch(self, width: int, projection: Callable[..., Projection] = SignFold) -> Sketch:
        """Project the Jacobian to rows of ``width`` numbers, in one pass over all samples."""
        task = self._task
        n_weights = {p.name: p.n_weights for p in self._layout.parameters}
        exact, projected = _split(n_weights, width)
        group_width = width // N_GROUPS
        folded = projection(projected, group_width, N_GROUPS, self._settings.seed, self._device)
        total = task.n_samples + (0 if task.validation is None else task.validation.n_samples)
        with self._bar(total) as bar:
            training, inner, trace = self._project(
                task, self._reference, exact, folded, width, bar
            )
            validation: tuple[torch.Tensor, ...] = ()
            if task.validation is not None:
                outputs = task.validation.initial_outputs(self._device, self._dtype)
                validation, _, _ = self._project(
                    task.validation, outputs, exact, folded, width, bar
                )
        return Sketch(training[0], training[1:], validation, inner, trace, not projected)

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

    def _project(
        self,
        task: FineTuningTask,
        reference: NDArray[np.float64],
        n_exact: dict[str, int],
        projection: Projection,
        width: int,
        bar: tqdm[Any],
    ) -> tuple[tuple[torch.Tensor, ...], NDArray[np.float64], float]:
        """Return exact columns and groups of a task's samples, ``J w (N, C)`` and the trace."""
        n, c = task.n_samples, task.n_outputs
        like = self._settings.place
        exact = torch.zeros((n, c, sum(n_exact.values())), **like)
        groups = torch.zeros((n, c, N_GROUPS, width // N_GROUPS), **like)
        offsets = dict(zip(n_exact, np.cumsum([0, *n_exact.values()]).tolist(), strict=False))
        inner = np.zeros((n, c))
        trace = 0.0
        weights = {n: p.detach() for n, p in self._frozen.parameters.items()}
        for first, state in self._states(task, reference, bar):
            samples = slice(first, first + state.n_samples)
            norms = torch.zeros((state.n_samples, c), dtype=torch.float64)
            for name, gradient in self._gradients(state):
                if (
                    name not in n_exact
                    and isinstance(gradient, Factors)
                    and gradient.expand is None
                ):
                    norms += _table_norms(gradient)
                    inner[samples] += gradient.inner(weights[name]).double().cpu().numpy()
                    projection.add_table(groups[samples], name, gradient)
                    continue
                columns = slice(offsets.get(name, 0), offsets.get(name, 0) + n_exact.get(name, 0))
                for some, rows in _row_blocks(gradient):
                    norms[some] += rows.square().sum(-1).double().cpu()
                    where = slice(first + some.start, first + some.stop)
                    inner[where] += row_products(rows, weights[name].flatten()).numpy()
                    if name in n_exact:
                        exact[where, :, columns] = rows
                        continue
                    projection.add(groups[where], name, rows)
            if not torch.isfinite(norms).all():
                state.check_finite(first, task.n_outputs)
            check_row_norms(task, self._frozen, first, norms, self._settings)
            trace += float(norms.sum())
        # They are views, because the groups together take the most memory.
        return (exact.flatten(0, 1), *groups.flatten(0, 1).unbind(1)), inner, trace

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
            desc="Sketched samples",
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


def _row_blocks(gradient: Contribution | Separated) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a gradient's rows ``(B, C, p)`` and the slice of their B samples, block by block.

    Blocks fit into the processor's cache; a gradient that is a tensor is a single block.
    """
    if isinstance(gradient, torch.Tensor):
        yield slice(0, len(gradient)), gradient
        return
    if isinstance(gradient, Separated):
        n_samples, classes, width, _ = gradient.weights.shape
        n_elements = classes * width * gradient.rows.shape[3]
    else:
        groups, classes, width, _, n_rows = gradient.shape
        n_samples = len(gradient.cotangents[0])
        n_elements = groups * classes * width * n_rows
    step = max(1, PRODUCTS.scratch // n_elements)
    for start in range(0, n_samples, step):
        samples = slice(start, min(start + step, n_samples))
        yield samples, _rows(gradient.of(samples))


def _rows(gradient: Contribution | Separated) -> torch.Tensor:
    """Return the rows of a gradient, of shape ``(B, C, p)``."""
    if isinstance(gradient, Separated):
        return gradient.gradient()
    return gradient.rows() if isinstance(gradient, Factors) else gradient


def _split(n_weights: dict[str, int], width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Split ``n_weights`` by name: the smallest parameters stay exact, the others are projected.

    The exact ones have at most ``max_exact_weights`` weights each, and in all at most
    ``exact_share`` times ``width``, the columns of the sketch.
    """
    exact: dict[str, int] = {}
    for name, n in sorted(n_weights.items(), key=lambda item: item[1]):
        if (
            n > SKETCHES.max_exact_weights
            or sum(exact.values()) + n > SKETCHES.exact_share * width
        ):
            break
        exact[name] = n
    return exact, {n: s for n, s in n_weights.items() if n not in exact}


def _table_norms(factors: Factors) -> torch.Tensor:
    """Return the squared norms ``(B, C)`` of the rows of a table's gradient."""
    ids = torch.cat(factors.sources, 1)
    cotangents = torch.cat(factors.cotangents, -1)[:, 0]
    same = (ids[:, :, None] == ids[:, None]).to(cotangents)
    mixed = cotangents @ same[:, None]
    return (mixed * cotangents).sum((2, 3)).double().cpu()


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
