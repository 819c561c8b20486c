"""How each parameter's part of the kernel is computed, and what that costs."""

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
    """How one parameter's part of the Jacobian is held and multiplied, and what that costs.

    The method is ``"rows"``, which are held and multiplied; ``"panels"``, where inputs and
    cotangents are held, and rows made from them slice by slice when they are multiplied;
    ``"ghost"``, where the kernel is contracted from inputs and cotangents without rows; or
    ``"separable"``, where cotangents are products of a channel's weight and a pattern. Flops for a
    sample are those of making rows, for a pair those of the product; scratch is for unfolded
    inputs while it is multiplied.
    """

    name: str
    n_weights: int
    multiplier: float
    method: str
    bytes_per_sample: int
    flops_per_sample: float
    flops_per_pair: float
    scratch_per_sample: int = 0


@dataclass(frozen=True)
class Layout:
    """How all parameters are held, and which columns their rows have.

    Parameters that are held as rows come first, by multiplier. ``offsets`` are the first columns
    of those whose rows are held together with those of others; large ones are held on their own.
    ``sections`` are ranges of columns of one multiplier, as (start, stop, multiplier). ``held`` is
    the precision of what is held, that of the Jacobian by default.
    """

    parameters: tuple[ParameterLayout, ...]
    n_columns: int
    offsets: dict[str, int]
    sections: tuple[tuple[int, int, float], ...]
    held: torch.dtype | None = None

    @property
    def bytes_per_sample(self) -> int:
        """Return the bytes that are held for one sample."""
        return sum(p.bytes_per_sample for p in self.parameters)

    @property
    def scratch_per_sample(self) -> int:
        """Return the bytes for unfolded inputs while a parameter is multiplied."""
        return max((p.scratch_per_sample for p in self.parameters), default=0)

    @property
    def has_multipliers(self) -> bool:
        """Return whether a learning-rate multiplier is not one."""
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
    """Choose for each parameter the cheapest way to hold and multiply its part of the Jacobian.

    Multiplying rows takes ``C^2 G o k`` multiplications for a pair of samples, the ghost form ``G
    (S^2 k + C o S^2 + C^2 o S)``. ``sizes`` are the weights of each parameter that moves an
    output; ``shapes`` are of its factors, :obj:`None` where only rows can be computed;
    ``separable`` are those whose cotangents are products of a channel's weight and a pattern;
    ``itemsize`` and ``held`` are the bytes and the precision of what is held.
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
    """Return whether rows are written where they stay by the product that makes them."""
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
    """Choose how one parameter is held, by the costs of :func:`make_layout`."""
    row_bytes = n_outputs * n_weights * itemsize
    product = 2.0 * n_outputs**2 * n_weights
    if shape is None:
        return ParameterLayout(name, n_weights, multiplier, "rows", row_bytes, 0.0, product)
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
            return ParameterLayout(name, n_weights, multiplier, "rows", row_bytes, making, product)
        return ParameterLayout(name, n_weights, multiplier, "ghost", factor_bytes, 0.0, ghost)
    # Unfolded inputs are made in single precision at least.
    unfolded = g * k * s * max(4, itemsize)
    if separable:
        held = g * o * (n_outputs + k) * itemsize
        once = 2.0 * g * o * (k + n_outputs**2)
        return ParameterLayout(
            name, n_weights, multiplier, "separable", held, 2.0 * n_weights * s, once
        )
    # Both halves of the triangle have the same number of pairs.
    pairs = LAYOUTS.triangle * n_samples
    if LAYOUTS.ghost_overhead * ghost * pairs < product * pairs + making:
        return ParameterLayout(
            name, n_weights, multiplier, "ghost", factor_bytes, 0.0, ghost, unfolded
        )
    method, held = ("rows", row_bytes) if row_bytes <= factor_bytes else ("panels", factor_bytes)
    scratch = unfolded if method == "panels" else 0
    return ParameterLayout(name, n_weights, multiplier, method, held, making, product, scratch)
