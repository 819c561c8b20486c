"""How each parameter's part of the kernel is computed, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optuna_ttp.ntk.jacobian._factor_shape import FactorShape


if TYPE_CHECKING:
    from collections.abc import Mapping


# The ghost form moves more memory a flop than one large matrix product.
GHOST_OVERHEAD = 1.4
# Block-lower triangle: this share of all pairs of rows is multiplied.
TRIANGLE = 0.53
# Weights from which on a parameter's rows are not held together with those of others.
_ALONE = 2048


@dataclass(frozen=True)
class ParameterLayout:
    """What happens to one parameter.

    Attributes:
        name:
            Among the trainable parameters.
        size:
            Its weights.
        multiplier:
            Of its learning rate.
        method:
            ``"rows"``: rows of the Jacobian are held and multiplied. ``"panels"``: inputs and
            cotangents are held, and rows are made from them slice by slice when multiplied.
            ``"ghost"``: the kernel is contracted from inputs and cotangents without rows.
            ``"separable"``: cotangents are products of a channel's weight and a pattern.
        bytes_per_sample:
            What is held.
        flops_per_sample:
            Of making rows.
        flops_per_pair:
            Of the product, of two samples.
        scratch_per_sample:
            Bytes for unfolded inputs while it is multiplied.
    """

    name: str
    size: int
    multiplier: float
    method: str
    bytes_per_sample: int
    flops_per_sample: float
    flops_per_pair: float
    scratch_per_sample: int = 0


@dataclass(frozen=True)
class Layout:
    """What happens to all parameters, and where their rows are.

    Attributes:
        parameters:
            Those that are held as rows come first, by multiplier.
        n_columns:
            Columns of the rows that are held together.
        offsets:
            First column of each parameter whose rows are held together with those of others.
            Large ones are held on their own.
        sections:
            Ranges of columns of the same multiplier, as (start, stop, multiplier).
        held:
            Precision of what is held; that of the Jacobian by default.
    """

    parameters: tuple[ParameterLayout, ...]
    n_columns: int
    offsets: dict[str, int]
    sections: tuple[tuple[int, int, float], ...]
    held: torch.dtype | None = None

    @property
    def bytes_per_sample(self) -> int:
        """What is held for one sample."""
        return sum(p.bytes_per_sample for p in self.parameters)

    @property
    def flops_per_sample(self) -> float:
        """Of making rows."""
        return sum(p.flops_per_sample for p in self.parameters)

    @property
    def flops_per_pair(self) -> float:
        """Of the products of two samples."""
        return sum(p.flops_per_pair for p in self.parameters)

    @property
    def scratch_per_sample(self) -> int:
        """Bytes for unfolded inputs while a parameter is multiplied."""
        return max((p.scratch_per_sample for p in self.parameters), default=0)

    @property
    def has_multipliers(self) -> bool:
        """Whether a learning-rate multiplier is not one."""
        of_sections = any(multiplier != 1.0 for _, _, multiplier in self.sections)
        return of_sections or any(p.multiplier != 1.0 for p in self.parameters)


def make_layout(
    sizes: Mapping[str, int],
    multipliers: Mapping[str, float],
    shapes: Mapping[str, FactorShape | None],
    *,
    separable: frozenset[str] = frozenset(),
    n_samples: int,
    n_outputs: int,
    itemsize: int,
    held: torch.dtype | None = None,
) -> Layout:
    """Choose for each parameter the cheapest way.

    Multiplying rows takes ``C^2 G o k`` multiplications for a pair of samples, the ghost form
    ``G (S^2 k + C o S^2 + C^2 o S)``.

    Args:
        sizes:
            Weights of each parameter that moves an output.
        multipliers:
            Learning-rate multipliers by the same names.
        shapes:
            Factors of the gradients; nothing where only rows can be had.
        separable:
            Those whose cotangents are products of a channel's weight and a pattern.
        n_samples:
            N.
        n_outputs:
            C.
        itemsize:
            Bytes of an element that is held.
        held:
            Precision of what is held, where it is not that of the Jacobian. None by default.

    Returns:
        The layout.
    """
    parameters = [
        _parameter_layout(
            name,
            size,
            multipliers[name],
            shapes.get(name),
            n_samples,
            n_outputs,
            itemsize,
            name in separable,
        )
        for name, size in sizes.items()
    ]
    parameters.sort(key=lambda p: (p.method != "rows", p.multiplier))
    offsets: dict[str, int] = {}
    sections: list[tuple[int, int, float]] = []
    column = 0
    for parameter in parameters:
        if parameter.method != "rows" or _is_alone(parameter, shapes.get(parameter.name)):
            continue
        offsets[parameter.name] = column
        stop = column + parameter.size
        if sections and sections[-1][2] == parameter.multiplier:
            sections[-1] = (sections[-1][0], stop, parameter.multiplier)
        else:
            sections.append((column, stop, parameter.multiplier))
        column = stop
    return Layout(tuple(parameters), column, offsets, tuple(sections), held)


def _is_alone(parameter: ParameterLayout, shape: FactorShape | None) -> bool:
    """Whether rows are written where they stay by the product that makes them."""
    return shape is not None and not shape.is_table and parameter.size >= _ALONE


def _parameter_layout(
    name: str,
    size: int,
    multiplier: float,
    shape: FactorShape | None,
    n_samples: int,
    n_outputs: int,
    itemsize: int,
    separable: bool,
) -> ParameterLayout:
    row_bytes = n_outputs * size * itemsize
    product = 2.0 * n_outputs**2 * size
    if shape is None:
        return ParameterLayout(name, size, multiplier, "rows", row_bytes, 0.0, product)
    g, o, s, k = shape.groups, shape.width, shape.positions, shape.n_rows
    factor_bytes = n_outputs * g * o * s * itemsize
    # Indices have eight bytes.
    factor_bytes += shape.source_size * (8 if shape.is_table else itemsize)
    ghost = 2.0 * g * ((0 if shape.is_table else s * s * k) + n_outputs * o * s * (s + n_outputs))
    if s == 1:
        ghost = 2.0 * g * (k + n_outputs**2 * o)
    making = 0.0 if shape.is_table else 2.0 * n_outputs * size * s
    if shape.is_table:
        if row_bytes <= factor_bytes:
            return ParameterLayout(name, size, multiplier, "rows", row_bytes, making, product)
        return ParameterLayout(name, size, multiplier, "ghost", factor_bytes, 0.0, ghost)
    # Made in single precision at least.
    unfolded = g * k * s * max(4, itemsize)
    if separable:
        held = g * o * (n_outputs + k) * itemsize
        once = 2.0 * g * o * (k + n_outputs**2)
        return ParameterLayout(name, size, multiplier, "separable", held, 2.0 * size * s, once)
    # Both halves of the triangle have the same number of pairs.
    pairs = TRIANGLE * n_samples
    if GHOST_OVERHEAD * ghost * pairs < product * pairs + making:
        return ParameterLayout(name, size, multiplier, "ghost", factor_bytes, 0.0, ghost, unfolded)
    method, held = ("rows", row_bytes) if row_bytes <= factor_bytes else ("panels", factor_bytes)
    scratch = unfolded if method == "panels" else 0
    return ParameterLayout(name, size, multiplier, method, held, making, product, scratch)
