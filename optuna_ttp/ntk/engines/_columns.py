"""The columns engine: a sample of the Jacobian's columns, each picked with a known probability.

A few rows tell which weights matter; then each sample is differentiated once for each output, by
cotangents only, and of every layer just the picked products are computed. Lookup tables are
picked from last, because which of their rows matter is known only after all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
import math
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
import torch
from tqdm import tqdm

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk._processes import add_up
from optuna_ttp.ntk._processes import by_first
from optuna_ttp.ntk._processes import gathered_objects
from optuna_ttp.ntk._processes import in_all
from optuna_ttp.ntk._processes import part_of_this_process
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._importance import Importance
from optuna_ttp.ntk.engines._importance import inclusion_factor
from optuna_ttp.ntk.engines._importance import probabilities
from optuna_ttp.ntk.engines._importance import systematic_sample
from optuna_ttp.ntk.engines._lookups import Lookups
from optuna_ttp.ntk.engines._low_rank import AdaptedLayer
from optuna_ttp.ntk.engines._low_rank import AdapterReader
from optuna_ttp.ntk.engines._low_rank import stored_layers
from optuna_ttp.ntk.engines._picked_columns import PickedColumns
from optuna_ttp.ntk.engines._rules import COLUMNS
from optuna_ttp.ntk.engines._self_check import plain_row
from optuna_ttp.ntk.jacobian._find_claims import find_claims
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._rules import CHECKS
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._low_rank_adapters import low_rank_adapters
from optuna_ttp.ntk.layers._picked import picked_columns
from optuna_ttp.ntk.layers._rule import Unsummed
from optuna_ttp.ntk.layers._sums import Sums


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


_Result = TypeVar("_Result")


def pick_columns(
    task: FineTuningTask,
    settings: EngineSettings,
    reference: NDArray[np.float64],
    *,
    n_columns: int,
    distributed: bool = False,
    products: bool = True,
) -> PickedColumns:
    """Pick about ``n_columns`` columns of a task's Jacobian, and compute them for all samples.

    ``reference`` are the initial outputs ``(N, C)``. With ``distributed`` each process of the
    default group reads its part of the samples, and all get all columns. Without ``products`` the
    weights of low-rank adapters are weights like others. Errors are those of
    :func:`~optuna_ttp.ntk.exact_kernel`.
    """

    def run(lifts: Mapping[str, int]) -> PickedColumns:
        with ColumnReader(task, settings, reference, lifts, distributed, products) as reader:
            return reader.pick(n_columns)

    return lifting(run)


@dataclass(frozen=True, eq=False)
class _FirstPicks:
    """Columns that are picked before all samples are read.

    ``totals`` are the scales of scores, ``factor`` is ``t``; ``picks`` are indices within the
    flattened parameters and ``chances`` their ``t s``, by the parameters' names.
    """

    totals: tuple[float, float]
    factor: float
    picks: dict[str, torch.Tensor]
    chances: dict[str, torch.Tensor]


class ColumnReader:
    """A context in which columns of a task's Jacobian are picked and read.

    ``lifts`` are those of :func:`~optuna_ttp.ntk.jacobian._prepare.lifting`. With ``distributed``
    the first process of the default group picks, and each reads its part of the samples.
    """

    def __init__(
        self,
        task: FineTuningTask,
        settings: EngineSettings,
        reference: NDArray[np.float64],
        lifts: Mapping[str, int],
        distributed: bool = False,
        products: bool = True,
    ) -> None:
        self._task, self._settings, self._lifts = task, settings, lifts
        self._products = products
        self._reference, self._distributed = reference, distributed

    def __enter__(self) -> ColumnReader:
        with ExitStack() as stack:
            in_all(partial(self._enter, stack), distributed=self._distributed)
            self._stack = stack.pop_all()
        return self

    def _enter(self, stack: ExitStack) -> None:
        """Freeze the model, and find out how each parameter is differentiated."""
        task, device, dtype = self._task, self._settings.device, self._settings.dtype
        # Before the model is put in evaluation mode, in which adapters have no dropout.
        self._adapters = low_rank_adapters(task.model) if self._products else ()
        self._frozen: FrozenModel = stack.enter_context(task.frozen(device, dtype))
        check_singles(task, self._frozen, self._reference, self._settings)
        n_checked = min(CHECKS.n_claim_samples, task.n_samples)
        inputs, _ = next(task.batches(n_checked, device, dtype))
        if device.type == "cpu" and dtype == torch.float32 and n_checked > 1:
            self._frozen.try_channels_last(inputs)
        self._claims = find_claims(
            self._frozen, inputs, n_checked, self._settings.seed, self._lifts
        )
        self._tape = stack.enter_context(self._claims.tape(self._frozen).attached())
        self._batch_size = max(1, min(COLUMNS.max_batch, -(-task.n_samples // 2)))

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def pick(self, n_columns: int) -> PickedColumns:
        """Pick about ``n_columns`` columns and compute them for all samples."""
        generator = torch.Generator().manual_seed(self._settings.seed)
        first = self._once(partial(self._first_picks, generator, n_columns))
        picks, chances = dict(first.picks), dict(first.chances)
        adapted = self._adapter_reader(self._task)
        columns, lookups, outputs = self._read(self._task, self._reference, picks, adapted)
        for name, lookup in lookups.items():
            picked = partial(self._picked_of_table, lookup, first, generator)
            picks[name], chances[name] = self._once(picked)
            columns = torch.cat([columns, lookup.columns(picks[name], columns)], 2)
        in_all(partial(self._check, columns, picks), distributed=self._distributed)
        validation = None
        validation_layers: Iterable[AdaptedLayer | None] = [None] * len(self._adapters)
        if self._task.validation is not None:
            task = self._task.validation
            reference = task.initial_outputs(self._settings.device, self._settings.dtype)
            reader = self._adapter_reader(task)
            validation, _, _ = self._read(task, reference, picks, reader)
            validation_layers = reader.layers()
        names = list(self._frozen.parameters)
        weights = {n: w.detach().flatten() for n, w in self._frozen.parameters.items()}
        plain = {n.removeprefix("model."): w for n, w in self._frozen.parameters.items()}
        return PickedColumns(
            columns.flatten(0, 1),
            None if validation is None else validation.flatten(0, 1),
            torch.cat(list(chances.values())),
            torch.cat([torch.full_like(p, names.index(n)) for n, p in picks.items()]),
            torch.cat(list(picks.values())),
            torch.cat([weights[n][p] for n, p in picks.items()]),
            self._weight_outputs(outputs),
            stored_layers(self._adapters, adapted.layers(), validation_layers, plain),
        )

    def _adapter_reader(self, task: FineTuningTask) -> AdapterReader:
        """Return what collects inputs and cotangents of adapted layers of a task's samples."""
        return AdapterReader(
            self._adapters, "model.", task.n_samples, task.n_outputs, self._settings.max_memory
        )

    def _once(self, run: Callable[[], _Result]) -> _Result:
        """Return ``run()``, which the first of several processes alone calls."""
        return by_first(run) if self._distributed else run()

    def _first_picks(self, generator: torch.Generator, n_columns: int) -> _FirstPicks:
        """Pick columns of all parameters but lookup tables, by a few rows of the Jacobian."""
        importances = self._importances(generator)
        totals = (
            sum(float(i.squares.double().sqrt().sum()) for i in importances.values()),
            sum(float(i.moduli.double().sum()) for i in importances.values()),
        )
        if not math.isfinite(totals[0]):
            self._refuse_overflow()
        if not totals[0] > 0.0:
            raise ValueError(
                "The Jacobian must not be zero: no trainable parameter moves any output. Is the "
                "head zero and the only trainable layer behind others?"
            )
        scores = {n: i.scores(*totals) for n, i in importances.items()}
        factor = inclusion_factor(scores.values(), n_columns)
        picks = {
            name: systematic_sample(probabilities(score, factor), generator)
            for name, score in scores.items()
            if not self._is_table(name)
        }
        chances = {name: (scores[name] * factor)[picked] for name, picked in picks.items()}
        return _FirstPicks(totals, factor, picks, chances)

    def _refuse_overflow(self) -> None:
        """Raise ValueError that names the first gradient that is not finite, or the overflow."""
        for n in range(self._task.n_samples):
            for c in range(self._task.n_outputs):
                row = plain_row(self._task, self._frozen, n, c, self._settings)
                if not all(bool(torch.isfinite(g).all()) for g in row.values()):
                    raise ValueError(
                        f"The gradient of output {c} of sample {n} must be finite but got NaN or "
                        "infinity."
                    )
        kind = str(self._settings.dtype).removeprefix("torch.")
        raise ValueError(
            f"The kernel must be finite but overflowed in {kind}. Scale the inputs, or compute "
            'with dtype="float64".'
        )

    def _picked_of_table(
        self, lookup: Lookups, first: _FirstPicks, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the picked columns of a lookup table, and their chances."""
        score = lookup.importance().scores(*first.totals)
        some = systematic_sample(probabilities(score, first.factor), generator)
        return lookup.positions(some), (score * first.factor)[some]

    def _is_table(self, name: str) -> bool:
        """Return whether a parameter is a lookup table, and only that."""
        shape = self._claims.shapes[name]
        return shape is not None and shape.is_table

    def _weight_outputs(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``J diag(c) w_0`` as the difference quotient of ``outputs`` along ``c w_0``.

        One more forward pass; the error is about the root of the rounding error.
        """
        task, place = self._task, (self._settings.device, self._settings.dtype)
        before = self._frozen.parameters
        step = torch.finfo(self._settings.dtype).eps ** 0.5
        factors = task.multipliers.values()
        moved = {
            # Other threads that look at the user's model meanwhile see trainable weights.
            name: ((1.0 + step * c) * w.detach()).requires_grad_()
            for (name, w), c in zip(before.items(), factors, strict=True)
        }
        self._frozen.replace_parameters(moved)
        try:
            with torch.no_grad():
                parts = [
                    self._frozen(inputs).double().cpu()
                    for inputs, _ in task.batches(self._batch_size, *place)
                ]
        finally:
            self._frozen.replace_parameters(before)
        return np.asarray((torch.cat(parts).numpy() - outputs) / step)

    def _check(self, columns: torch.Tensor, picks: dict[str, torch.Tensor]) -> None:
        """Raise JacobianMismatchError if two random rows differ from plain reverse mode.

        ValueError is raised if a gradient is not finite.
        """
        # A sum over all entries is not finite if one is not, and takes no memory.
        if not math.isfinite(float(columns.sum())) and not bool(torch.isfinite(columns).all()):
            self._refuse_overflow()
        rng = np.random.default_rng(self._settings.seed)
        tolerance = CHECKS.kernel_tolerances[self._frozen.precision]
        for _ in range(2):
            n, c = int(rng.integers(self._task.n_samples)), int(rng.integers(columns.shape[1]))
            row = plain_row(self._task, self._frozen, n, c, self._settings)
            parts = columns[n, c].split([len(p) for p in picks.values()])
            away = {
                name: float((part - row[name].flatten()[picked]).norm())
                for part, (name, picked) in zip(parts, picks.items(), strict=True)
            }
            scale = math.hypot(*(float(g.norm()) for g in row.values()))
            if math.isfinite(scale) and not math.hypot(*away.values()) <= tolerance * scale:
                worst = max(away, key=lambda name: away[name]).removeprefix("model.")
                raise JacobianMismatchError(
                    f"The gradient of output {c} of sample {n} must be that of plain automatic "
                    f"differentiation but got one that differs by {max(away.values()):.2g} of "
                    f"{scale:.2g}. The gradient of {worst!r} differs most."
                )

    def _importances(self, generator: torch.Generator) -> dict[str, Importance]:
        """Estimate the columns' mean squares and mean absolute values from a few rows.

        A row is the gradient of a sum of all outputs of one sample with random signs: its squared
        entries are those of the outputs' rows, summed up, in expectation.
        """
        task = self._task
        n_rows = min(COLUMNS.n_rows, task.n_samples)
        chosen = torch.randperm(task.n_samples, generator=generator)[:n_rows].sort().values
        collected: dict[str, list[torch.Tensor]] = {}
        lookups: dict[str, Lookups] = {}
        for start in range(0, n_rows, self._batch_size):
            indices = chosen[start : start + self._batch_size].tolist()
            inputs, _ = task.batch(indices, self._settings.device, self._settings.dtype)
            recording = self._tape.record(inputs, len(indices))
            signs = torch.randint(0, 2, recording.outputs.shape, generator=generator) * 2 - 1
            cotangents = recording.cotangents([signs.to(recording.outputs)])
            sums: dict[str, torch.Tensor] = {}
            for name, part in self._claims.gradients(recording, cotangents):
                if self._is_table(name) and isinstance(part, Factors):
                    samples = slice(start, start + len(indices))
                    lookups.setdefault(name, Lookups()).add(samples, slice(0, 1), part)
                    continue
                rows = (part.rows() if isinstance(part, Factors) else part)[:, 0]
                sums[name] = sums[name] + rows if name in sums else rows
            for name, rows in sums.items():
                collected.setdefault(name, []).append(rows)
        importances = {
            name: Importance.of_rows(torch.cat(parts), _width(self._frozen.parameters[name]))
            for name, parts in collected.items()
        }
        return {**importances, **{name: part.importance() for name, part in lookups.items()}}

    def _read(
        self,
        task: FineTuningTask,
        reference: NDArray[np.float64],
        picks: dict[str, torch.Tensor],
        adapted: AdapterReader,
    ) -> tuple[torch.Tensor, dict[str, Lookups], NDArray[np.float64]]:
        """Return picked columns ``(N, C, d)`` of a task's samples, parameter by parameter.

        Contributions to factors of low-rank adapters are added to ``adapted``, too. Those to
        lookup tables without picks are returned by name, to be picked from; then the outputs,
        ``(N, C)``, from the same batches.
        """
        shape = (task.n_samples, task.n_outputs, sum(len(p) for p in picks.values()))
        columns = torch.zeros(shape, **self._settings.place)
        read = partial(self._read_part, task, reference, picks, adapted, columns)
        lookups, outputs = in_all(read, distributed=self._distributed)
        if self._distributed:
            for whole in (columns, torch.from_numpy(outputs)):
                add_up(whole)
            lookups = Lookups.joined(gathered_objects(lookups))
            adapted.join(gathered_objects(adapted.parts))
        return columns, lookups, outputs

    def _read_part(
        self,
        task: FineTuningTask,
        reference: NDArray[np.float64],
        picks: dict[str, torch.Tensor],
        adapted: AdapterReader,
        columns: torch.Tensor,
    ) -> tuple[dict[str, Lookups], NDArray[np.float64]]:
        """Write the columns of this process's samples; return lookups and outputs, as `_read`.

        What belongs to samples of other processes stays zero.
        """
        ends = np.cumsum([0, *(len(p) for p in picks.values())]).tolist()
        places = {n: slice(a, b) for n, a, b in zip(picks, ends[:-1], ends[1:], strict=True)}
        lookups: dict[str, Lookups] = {}
        reader = SampleReader(
            task,
            self._frozen,
            self._claims,
            self._tape,
            self._settings,
            batch_size=self._batch_size,
            reference=reference,
        )
        part = (
            part_of_this_process(task.n_samples) if self._distributed else slice(0, task.n_samples)
        )
        with self._bar(part.stop - part.start) as bar:
            for samples, classes, contributions in reader.contributions(part.start, part.stop):
                for name, contribution in contributions:
                    adapted.add(samples, classes, name, contribution)
                    if name in picks:
                        picked = _picked(contribution, picks[name])
                        columns[samples, classes, places[name]] += picked
                    elif isinstance(contribution, Factors):
                        lookups.setdefault(name, Lookups()).add(samples, classes, contribution)
                bar.update((samples.stop - samples.start) * (classes.stop - classes.start))
        return lookups, reader.outputs

    def _bar(self, total: int) -> tqdm[Any]:
        """Return a progress bar for ``total`` samples, hidden if the settings say so."""
        return tqdm(
            total=total * self._task.n_outputs,
            desc="Rows of the Jacobian",
            unit="row",
            disable=None if self._settings.show_progress_bar else True,
            leave=False,
        )


def _picked(contribution: Unsummed, picked: torch.Tensor) -> torch.Tensor:
    """Return the picked columns ``(B, C, m)`` of a contribution to a gradient."""
    if isinstance(contribution, Factors):
        return picked_columns(contribution, picked)
    if isinstance(contribution, Sums):
        return contribution.columns(picked)
    return contribution.index_select(2, picked)


def _width(parameter: torch.Tensor) -> int:
    """Return the length of a weight's first axis, one for a vector."""
    return len(parameter) if parameter.ndim > 1 else 1
