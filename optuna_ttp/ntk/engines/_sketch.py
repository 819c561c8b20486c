"""The sketching engine: a random projection of the Jacobian instead of the Jacobian.

Each sample is differentiated once; its row for each output is projected to a few thousand numbers
at once, so that time and memory grow with N, not with its square. Small parameters and the head
are kept as they are. Four independent groups of columns give an error bar: each is right in
expectation, see :mod:`optuna_ttp.ntk.engines._sketch_error`. Two more passes refine the leading
eigenpairs; see :func:`refine`.
"""

from __future__ import annotations

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

from optuna_ttp.ntk.engines._choice import check_multipliers
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._projection import Projection
from optuna_ttp.ntk.engines._projection import SignFold
from optuna_ttp.ntk.engines._projection import Ternary
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
from optuna_ttp.ntk.layers._factors import SCRATCH
from optuna_ttp.ntk.layers._rule import Contribution


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


# Parameters that are not larger are kept as they are, the smallest first.
_KEPT_SIZE = 2048
# Together they have at most so many columns for each one of the sketch.
_KEPT_SHARE = 0.5
# Independent projections of which a sketch is the mean.
N_GROUPS = 4
_BATCH_BYTES = 2**27
_MAX_BATCH = 32


@dataclass(frozen=True, eq=False)
class Sketch:
    """A projected Jacobian.

    Attributes:
        kept:
            Columns that are exact, of shape ``(N C, e)``.
        groups:
            Four independent projections, each of shape ``(N C, d / 4)`` with the scale of the
            Jacobian.
        validation:
            The same five for the validation samples; empty without any.
        weight_outputs:
            ``J diag(c) w_0``, exact, of shape ``(N, C)``.
        trace:
            The trace of the kernel, exact.
        is_exact:
            All columns are kept: the groups are zero.
    """

    kept: torch.Tensor
    groups: tuple[torch.Tensor, ...]
    validation: tuple[torch.Tensor, ...]
    weight_outputs: NDArray[np.float64]
    trace: float
    is_exact: bool

    def features(self) -> torch.Tensor:
        """Return ``Z`` with ``Z Z^T`` for the kernel: what is exact, then group after group."""
        return _joined(self.kept, self.groups)

    def validation_features(self) -> torch.Tensor | None:
        """Return the validation samples' ``Z``."""
        return _joined(self.validation[0], self.validation[1:]) if self.validation else None


def _joined(kept: torch.Tensor, groups: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([kept, *(len(groups) ** -0.5 * g for g in groups)], 1)


def sketch_jacobian(
    task: FineTuningTask,
    *,
    width: int,
    projection: str = "sign_fold",
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> Sketch:
    """Project the Jacobian of a task.

    Args:
        task:
            What is fine-tuned. All learning-rate multipliers must be one.
        width:
            Numbers a row, a quarter of them for each group.
        projection:
            ``"sign_fold"`` (the default) or ``"ternary"``, the paper's.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian. Single precision by default.
        seed:
            Of the projection, and of what gradients are checked on. Zero by default.
        show_progress_bar:
            Show a progress bar where the standard error stream is a terminal.

    Returns:
        The sketch.

    Raises:
        ValueError:
            As for :func:`~optuna_ttp.ntk.exact_kernel`, and for a projection that is not
            known or a width that is not a positive multiple of four.
        JacobianMismatchError:
            If rows differ from what plain automatic differentiation gives.
    """
    if projection not in ("sign_fold", "ternary"):
        raise ValueError(f'projection must be "sign_fold" or "ternary" but got {projection!r}.')
    check_multipliers(task, "sketch")
    if width < N_GROUPS or width % N_GROUPS:
        raise ValueError(f"width must be a positive multiple of {N_GROUPS} but got {width!r}.")

    def run(lifts: Mapping[str, int]) -> Sketch:
        with Passes(task, device, dtype, seed, lifts, show_progress_bar) as passes:
            return passes.sketch(width, projection, seed)

    return lifting(run)


def refine(
    task: FineTuningTask,
    features: torch.Tensor,
    pairs: Eigenpairs,
    *,
    n_refined: int,
    others: torch.Tensor | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_memory: int = 4 * 2**30,
    show_progress_bar: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replace the leading part of a sketch by what the Jacobian itself says of it.

    For the leading eigenvectors ``V`` of the sketch, ``Theta V = J (J^T V)`` is computed in two
    more passes over the data, and ``Theta V (V^T Theta V)^(-1) (Theta V)^T`` takes the place of
    the sketch there (Nystrom's method, stabilised as in Tropp, Yurtsever, Udell and Cevher,
    NeurIPS 2017, arXiv 1706.05736). That is one step of subspace iteration further than a
    Rayleigh-Ritz projection, for one more pass.

    The validation samples' sketch ``Z_v`` is refined alike, for one pass over them: with
    ``J_v (J^T V)`` the leading part is extended to them, and what is left of the sketch there is
    what that does not explain.

    Args:
        task:
            What is fine-tuned.
        features:
            The sketch ``Z``, of shape ``(N C, d)``.
        pairs:
            Its eigenpairs.
        n_refined:
            How many are refined.
        others:
            The validation samples' sketch ``Z_v``, of shape ``(N_v C, d)``. None by default.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian. Single precision by default.
        seed:
            Of what gradients are checked on. Zero by default.
        max_memory:
            Bytes for ``J^T V``; where it is larger, more passes are made. 4 GiB by default.
        show_progress_bar:
            Show a progress bar where the standard error stream is a terminal.

    Returns:
        Features of the same number of rows, whose products are the refined kernel, and those of
        the validation samples, whose products with them are the refined cross kernel.

    Raises:
        ValueError:
            If the kernel overflowed.
    """
    n = min(n_refined, len(pairs.eigenvalues))
    vectors = torch.as_tensor(pairs.eigenvectors[:, :n], dtype=dtype, device=device)

    def run(lifts: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        with Passes(task, device, dtype, seed, lifts, show_progress_bar) as passes:
            return passes.images(vectors, max_memory, others=others is not None)

    images, *images_of_others = lifting(run)
    basis, values, weights = nystrom(vectors.double().cpu(), images)
    roots = values.sqrt().to(features)
    basis = basis.to(features)
    explained = basis.T @ features
    refined = torch.cat([basis * roots, features - basis @ explained], 1)
    if others is None:
        return refined, None
    extended = (images_of_others[0] @ weights).to(features)
    return refined, torch.cat([extended * roots, others - extended @ explained], 1)


def nystrom(
    vectors: torch.Tensor, images: torch.Tensor, n_wanted: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return orthonormal eigenvectors ``U`` and eigenvalues of ``Y (V^T Y)^(-1) Y^T``.

    They are those of ``L^(-1) Y^T Y L^(-T)`` with ``L L^T = V^T Y``, so that nothing of the size
    of ``Y`` is held beside what is returned.

    Args:
        vectors:
            ``V``, of shape ``(n, p)``, with orthonormal columns.
        images:
            ``Y = Theta V``.
        n_wanted:
            How many of them, the largest. All by default.

    Returns:
        The eigenvectors, their eigenvalues, and weights ``W`` with ``U = Y W``, up to rounding.

    Raises:
        ValueError:
            If the kernel overflowed.
    """
    if not torch.isfinite(images).all():
        raise ValueError(
            "The kernel must be finite but overflowed. Scale the inputs, or compute with "
            'dtype="float64".'
        )
    inner, squares = vectors.T @ images, images.T @ images
    inner = (inner + inner.T) / 2
    # Single precision made the images: smaller shifts would leave the root undefined.
    shift = 1e-6 * float(torch.linalg.matrix_norm(squares, 2)) ** 0.5
    identity = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    root = torch.linalg.cholesky(inner + shift * identity)
    squares = squares + 2.0 * shift * inner + shift**2 * identity
    half = torch.linalg.solve_triangular(root, squares, upper=False)
    small = torch.linalg.solve_triangular(root, half.T, upper=False)
    values, mixing = torch.linalg.eigh((small + small.T) / 2)
    values, mixing = values.flip(0)[:n_wanted], mixing.flip(1)[:, :n_wanted]
    values = values.clamp(min=shift)
    weights = torch.linalg.solve_triangular(root.T, mixing, upper=True) / values.sqrt()
    return images @ weights + vectors @ (shift * weights), values - shift, weights


class Passes:
    """Passes over the data with the same hooks.

    Args:
        task:
            What is fine-tuned.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian.
        seed:
            Of what gradients are checked on.
        lifts:
            See :func:`~optuna_ttp.ntk.jacobian._prepare.lifting`.
        show_progress_bar:
            Whether to show one.
    """

    def __init__(
        self,
        task: FineTuningTask,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        lifts: Mapping[str, int],
        show_progress_bar: bool,
    ) -> None:
        self._task, self._device, self._dtype = task, device, dtype
        self._seed, self._lifts, self._show = seed, lifts, show_progress_bar

    def __enter__(self) -> Passes:
        task, device, dtype = self._task, self._device, self._dtype
        with ExitStack() as stack:
            reference = task.initial_outputs(device, dtype)
            self._frozen: FrozenModel = stack.enter_context(task.frozen(device, dtype))
            check_singles(task, self._frozen, reference, device, dtype)
            found = prepare(
                task, self._frozen, device=device, dtype=dtype, seed=self._seed, lifts=self._lifts
            )
            self._layout = _layout_of_factors(task, self._frozen, found, dtype)
            self._preparation = found
            self._tape = stack.enter_context(found.claims.tape(self._frozen).attached())
            n = task.n_samples
            making = found.bytes_per_sample + self._layout.bytes_per_sample
            batch = max(1, min(_MAX_BATCH, -(-n // 2), _BATCH_BYTES // max(1, making)))
            self._batch_size = batch
            self._reference = reference
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    @property
    def preparation(self) -> Preparation:
        """What a look at a few samples has shown, and how a batch is held."""
        return replace(self._preparation, layout=self._layout)

    @property
    def batch_size(self) -> int:
        """Samples that go through the network together."""
        return self._batch_size

    def sketch_bytes(self, width: int) -> int:
        """Say what a sketch takes at its peak, on top of the model and the data.

        Args:
            width:
                Numbers a row.
        """
        task = self._task
        itemsize = torch.empty((), dtype=self._dtype).element_size()
        kept, projected = _split({p.name: p.size for p in self._layout.parameters}, width)
        n_held_out = 0 if task.validation is None else task.validation.n_samples
        n_rows = (task.n_samples + n_held_out) * task.n_outputs
        rows = n_rows * (sum(kept.values()) + width) * itemsize
        held = self._layout.bytes_per_sample + self._preparation.bytes_per_sample
        # Weights in another layout, and one gradient that is compared; signs take a byte each.
        weights = 2 * task.n_parameters * itemsize + N_GROUPS * sum(projected.values())
        return rows + self._batch_size * held + 2 * SCRATCH * itemsize + weights

    def sketch(self, width: int, projection: str, seed: int) -> Sketch:
        task = self._task
        sizes = {p.name: p.size for p in self._layout.parameters}
        kept, projected = _split(sizes, width)
        own_width = width // N_GROUPS
        folded: Projection = (
            Ternary(own_width, N_GROUPS, seed, list(projected))
            if projection == "ternary"
            else SignFold(projected, own_width, N_GROUPS, seed, self._device)
        )
        total = task.n_samples + (0 if task.validation is None else task.validation.n_samples)
        with self._bar(total) as bar:
            own, inner, trace = self._project(task, self._reference, kept, folded, width, bar)
            validation: tuple[torch.Tensor, ...] = ()
            if task.validation is not None:
                outputs = task.validation.initial_outputs(self._device, self._dtype)
                validation, _, _ = self._project(
                    task.validation, outputs, kept, folded, width, bar
                )
        return Sketch(own[0], own[1:], validation, inner, trace, not projected)

    def images(
        self, vectors: torch.Tensor, max_memory: int, *, own: bool = True, others: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return ``J (J^T V)``, in double precision.

        Args:
            vectors:
                ``V``, of shape ``(N C, p)``.
            max_memory:
                Bytes for ``J^T V``; where it is larger, more passes are made.
            own:
                Of the training samples. On by default.
            others:
                Of the validation samples: ``J_v (J^T V)``. Off by default.

        Returns:
            One for each kind of samples, the training samples first.
        """
        wanted: list[tuple[FineTuningTask, NDArray[np.float64]]] = []
        if own:
            wanted.append((self._task, self._reference))
        if others:
            held_out = self._task.validation
            assert held_out is not None
            wanted.append((held_out, held_out.initial_outputs(self._device, self._dtype)))
        n_vectors = vectors.shape[1]
        groups: list[list[str]] = [[]]
        held = 0
        for p in self._layout.parameters:
            size = p.size * n_vectors * vectors.element_size()
            if groups[-1] and held + size > max_memory // 2:
                groups.append([])
                held = 0
            groups[-1].append(p.name)
            held += size
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
        """``J^T V`` of some parameters."""
        n_outputs = self._task.n_outputs
        sizes = {p.name: p.size for p in self._layout.parameters}
        products: dict[str, torch.Tensor] = {}
        for first, state in self._states(self._task, self._reference, bar):
            chosen = vectors[first * n_outputs : (first + state.n_samples) * n_outputs]
            for name, gradient in self._gradients(state):
                if name not in names:
                    continue
                if name not in products:
                    products[name] = vectors.new_zeros((sizes[name], vectors.shape[1]))
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
        kept: dict[str, int],
        projection: Projection,
        width: int,
        bar: tqdm[Any],
    ) -> tuple[tuple[torch.Tensor, ...], NDArray[np.float64], float]:
        n, c = task.n_samples, task.n_outputs
        like: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        exact = torch.zeros((n, c, sum(kept.values())), **like)
        groups = torch.zeros((n, c, N_GROUPS, width // N_GROUPS), **like)
        offsets = dict(zip(kept, np.cumsum([0, *kept.values()]).tolist(), strict=False))
        inner = np.zeros((n, c))
        trace = 0.0
        weights = {n: p.detach() for n, p in self._frozen.parameters.items()}
        for first, state in self._states(task, reference, bar):
            samples = slice(first, first + state.n_samples)
            norms = torch.zeros((state.n_samples, c), dtype=torch.float64)
            for name, gradient in self._gradients(state):
                if name not in kept and isinstance(gradient, Factors) and gradient.expand is None:
                    norms += _table_norms(gradient)
                    inner[samples] += gradient.inner(weights[name]).double().cpu().numpy()
                    projection.add_table(groups[samples], name, gradient)
                    continue
                columns = slice(offsets.get(name, 0), offsets.get(name, 0) + kept.get(name, 0))
                for some, rows in _row_blocks(gradient):
                    norms[some] += rows.square().sum(-1).double().cpu()
                    where = slice(first + some.start, first + some.stop)
                    inner[where] += row_products(rows, weights[name].flatten()).numpy()
                    if name in kept:
                        exact[where, :, columns] = rows
                        continue
                    projection.add(groups[where], name, rows)
            self._refuse_infinite(state, norms, first)
            check_row_norms(
                task, self._frozen, first, norms, self._device, self._dtype, self._seed
            )
            trace += float(norms.sum())
        # Views, because the groups together are the largest of all.
        return (exact.flatten(0, 1), *groups.flatten(0, 1).unbind(1)), inner, trace

    def _states(
        self,
        task: FineTuningTask,
        reference: NDArray[np.float64],
        bar: tqdm[Any],
    ) -> Iterator[tuple[int, BlockState]]:
        reader = SampleReader(
            task,
            self._frozen,
            self._preparation.claims,
            self._tape,
            batch_size=self._batch_size,
            device=self._device,
            dtype=self._dtype,
            reference=reference,
        )
        for first in range(0, task.n_samples, self._batch_size):
            last = min(first + self._batch_size, task.n_samples)
            # What rows give of the weights costs less than what factors give.
            state, _ = reader.read(self._layout, first, last, weight_outputs=False)
            yield first, state
            bar.update(last - first)

    def _gradients(self, state: BlockState) -> Iterator[tuple[str, Contribution | Separated]]:
        rows = state.rows.unflatten(0, (state.n_samples, self._task.n_outputs))
        sizes = {p.name: p.size for p in self._layout.parameters}
        for name, offset in self._layout.offsets.items():
            yield name, rows[..., offset : offset + sizes[name]]
        yield from state.factors.items()
        yield from state.separated.items()

    def _bar(self, total: int) -> tqdm[Any]:
        return tqdm(
            total=total,
            desc="Sketched samples",
            unit="sample",
            disable=None if self._show else True,
            leave=False,
        )

    def _refuse_infinite(self, state: BlockState, norms: torch.Tensor, first: int) -> None:
        if torch.isfinite(norms).all():
            return
        bad = state.first_not_finite(self._task.n_outputs)
        if bad is not None:
            raise ValueError(
                f"The gradient of output {bad[1]} of sample {first + bad[0]} must be finite but "
                "got NaN or infinity."
            )


def _layout_of_factors(
    task: FineTuningTask, frozen: FrozenModel, found: Preparation, dtype: torch.dtype
) -> Layout:
    """Rows are made when they are projected, not before."""
    parameters = tuple(
        replace(p, method="ghost" if shape.is_table else "panels")
        if (shape := found.claims.shapes[p.name]) is not None and p.method != "separable"
        else p
        for p in found.layout.parameters
    )
    offsets: dict[str, int] = {}
    column = 0
    for p in parameters:
        if p.method == "rows":
            offsets[p.name] = column
            column += p.size
    return Layout(parameters, column, offsets, ())


def _row_blocks(gradient: Contribution | Separated) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of so few samples that the processor's cache holds them while they are used."""
    if isinstance(gradient, torch.Tensor):
        yield slice(0, len(gradient)), gradient
        return
    if isinstance(gradient, Separated):
        n_samples, classes, width, _ = gradient.weights.shape
        size = classes * width * gradient.rows.shape[3]
    else:
        groups, classes, width, _, n_rows = gradient.shape
        n_samples = len(gradient.cotangents[0])
        size = groups * classes * width * n_rows
    step = max(1, SCRATCH // size)
    for start in range(0, n_samples, step):
        samples = slice(start, min(start + step, n_samples))
        yield samples, _rows(gradient.of(samples))


def _rows(gradient: Contribution | Separated) -> torch.Tensor:
    """Shape ``(B, C, p)``."""
    if isinstance(gradient, Separated):
        return gradient.gradient()
    return gradient.rows() if isinstance(gradient, Factors) else gradient


def _split(sizes: dict[str, int], width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Which parameters are kept as they are, and which are projected."""
    kept: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        if size > _KEPT_SIZE or sum(kept.values()) + size > _KEPT_SHARE * width:
            break
        kept[name] = size
    return kept, {n: s for n, s in sizes.items() if n not in kept}


def _table_norms(factors: Factors) -> torch.Tensor:
    """Squared norms of a table's rows: positions with the same index add up first."""
    ids = torch.cat(factors.sources, 1)
    cotangents = torch.cat(factors.cotangents, -1)[:, 0]
    same = (ids[:, :, None] == ids[:, None]).to(cotangents)
    mixed = cotangents @ same[:, None]
    return (mixed * cotangents).sum((2, 3)).double().cpu()


def _table_product(factors: Factors, vectors: torch.Tensor) -> torch.Tensor:
    """``G^T V`` of a table, of shape ``(p, n)``, for ``V`` of shape ``(B C, n)``."""
    width = factors.shape[2]
    total = vectors.new_zeros((factors.n_rows, width, vectors.shape[1]))
    for ids, cotangents in zip(factors.sources, factors.cotangents, strict=True):
        d = cotangents[:, 0]
        chosen = vectors.unflatten(0, (len(d), -1))
        values = torch.einsum("bcos,bcn->bson", d, chosen)
        total.index_add_(0, ids.flatten(), values.flatten(0, 1))
    return total.flatten(0, 1)


def _table_image(factors: Factors, weights: torch.Tensor) -> torch.Tensor:
    """``G W`` of a table, of shape ``(B C, n)``, for ``W`` of shape ``(p, n)``."""
    width = factors.shape[2]
    matrices = weights.unflatten(0, (factors.n_rows, width))
    parts = [
        torch.einsum("bcos,bson->bcn", cotangents[:, 0], matrices[ids])
        for ids, cotangents in zip(factors.sources, factors.cotangents, strict=True)
    ]
    return torch.stack(parts).sum(0).flatten(0, 1)
