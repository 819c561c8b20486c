"""The choice of how each parameter's part of the Jacobian is stored and multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optuna_ttp.ntk.jacobian._factor_shape import FactorShape
from optuna_ttp.ntk.jacobian._rules import LAYOUTS


if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter's part of the Jacobian is stored and multiplied.

    The method is ``"rows"``, which are stored and multiplied; ``"panels"``, which are slices of
    rows, computed from stored inputs and cotangents when they are multiplied; ``"ghost"``, which
    contracts stored inputs and cotangents without rows; or ``"separable"``, for cotangents that
    are products of a channel's weight and a pattern. ``scratch_per_sample`` are bytes for unfolded
    inputs.
    """

    name: str
    n_weights: int
    multiplier: float
    method: str
    bytes_per_sample: int
    scratch_per_sample: int = 0


@dataclass(frozen=True)
class Layout:
    """How all parameters are stored, and the columns of their rows in one common tensor.

    Parameters stored as rows come first, sorted by multiplier. ``offsets`` are the first columns
    of small parameters in the common tensor, of ``n_columns`` columns; large ones have their own.
    ``sections`` are ranges of columns of one multiplier, as (start, stop, multiplier). ``held`` is
    the precision of storage, None for that of the Jacobian.
    """

    parameters: tuple[ParameterLayout, ...]
    n_columns: int
    offsets: dict[str, int]
    sections: tuple[tuple[int, int, float], ...]
    held: torch.dtype | None = None

    @property
    def bytes_per_sample(self) -> int:
        """Return the bytes of storage for one sample."""
        return sum(p.bytes_per_sample for p in self.parameters)

    @property
    def scratch_per_sample(self) -> int:
        """Return the bytes for one sample's unfolded inputs while a parameter is multiplied."""
        return max((p.scratch_per_sample for p in self.parameters), default=0)

    @property
    def has_multipliers(self) -> bool:
        """Return whether any learning-rate multiplier is not one."""
        of_sections = any(multiplier != 1.0 for _, _, multiplier in self.sections)
        return of_sections or any(p.multiplier != 1.0 for p in self.parameters)


def make_layout(
    n_weights: Mapping[str, int],
    multipliers: Mapping[str, float],
    shapes: Mapping[str, FactorShape | None],
    *,
    separable: frozenset[str] = frozenset(),
    n_samples: int,
    n_outputs: int,
    itemsize: int,
    held: torch.dtype | None = None,
) -> Layout:
    """Choose for each parameter the cheapest way to store and multiply its part of the Jacobian.

    A product of rows takes ``C^2 G o k`` multiplications per pair of samples, the ghost form ``G
    (S^2 k + C o S^2 + C^2 o S)``. ``n_weights`` are the numbers of weights of each used parameter;
    ``shapes`` are those of its factors, :obj:`None` if only rows can be computed; ``separable``
    are the parameters whose cotangents are products of a channel's weight and a pattern;
    ``itemsize`` and ``held`` are the bytes of a number and the precision of storage.
    """
    parameters = [
        _parameter_layout(
            name,
            n,
            multipliers[name],
            shapes.get(name),
            n_samples,
            n_outputs,
            itemsize,
            name in separable,
        )
        for name, n in n_weights.items()
    ]
    parameters.sort(key=lambda p: (p.method != "rows", p.multiplier))
    offsets: dict[str, int] = {}
    sections: list[tuple[int, int, float]] = []
    column = 0
    for parameter in parameters:
        if parameter.method != "rows" or _is_alone(parameter, shapes.get(parameter.name)):
            continue
        offsets[parameter.name] = column
        stop = column + parameter.n_weights
        if sections and sections[-1][2] == parameter.multiplier:
            sections[-1] = (sections[-1][0], stop, parameter.multiplier)
        else:
            sections.append((column, stop, parameter.multiplier))
        column = stop
    return Layout(tuple(parameters), column, offsets, tuple(sections), held)


def _is_alone(parameter: ParameterLayout, shape: FactorShape | None) -> bool:
    """Return whether a parameter's rows have a tensor of their own, as large products do."""
    return shape is not None and not shape.is_table and parameter.n_weights >= LAYOUTS.n_alone


def _parameter_layout(
    name: str,
    n_weights: int,
    multiplier: float,
    shape: FactorShape | None,
    n_samples: int,
    n_outputs: int,
    itemsize: int,
    separable: bool,
) -> ParameterLayout:
    """Choose how one parameter is stored, by the costs that :func:`make_layout` states."""
    row_bytes = n_outputs * n_weights * itemsize
    product = 2.0 * n_outputs**2 * n_weights
    if shape is None:
        return ParameterLayout(name, n_weights, multiplier, "rows", row_bytes)
    g, o, s, k = shape.groups, shape.width, shape.positions, shape.n_rows
    factor_bytes = n_outputs * g * o * s * itemsize
    # Indices have eight bytes.
    factor_bytes += shape.source_size * (8 if shape.is_table else itemsize)
    ghost = 2.0 * g * ((0 if shape.is_table else s * s * k) + n_outputs * o * s * (s + n_outputs))
    if s == 1:
        ghost = 2.0 * g * (k + n_outputs**2 * o)
    making = 0.0 if shape.is_table else 2.0 * n_outputs * n_weights * s
    if shape.is_table:
        if row_bytes <= factor_bytes:
            return ParameterLayout(name, n_weights, multiplier, "rows", row_bytes)
        return ParameterLayout(name, n_weights, multiplier, "ghost", factor_bytes)
    # Unfolded inputs are in single precision at least.
    unfolded = g * k * s * max(4, itemsize)
    if separable:
        held = g * o * (n_outputs + k) * itemsize
        return ParameterLayout(name, n_weights, multiplier, "separable", held)
    # Only the lower triangle is multiplied: this is the number of pairs per sample.
    pairs = LAYOUTS.triangle * n_samples
    if LAYOUTS.ghost_overhead * ghost * pairs < product * pairs + making:
        return ParameterLayout(name, n_weights, multiplier, "ghost", factor_bytes, unfolded)
    method, held = ("rows", row_bytes) if row_bytes <= factor_bytes else ("panels", factor_bytes)
    scratch = unfolded if method == "panels" else 0
    return ParameterLayout(name, n_weights, multiplier, method, held, scratch)
