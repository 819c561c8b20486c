"""The inputs and cotangents of layers with low-rank adapters, from one pass over the samples."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._low_rank_adapters import LowRankAdapter
from optuna_ttp.ntk.layers._rule import Unsummed
from optuna_ttp.spectrum import LowRankLayer


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """The inputs ``(N, S, k)`` of an adapter, and cotangents ``(N, C, S, o)`` of its output."""

    inputs: torch.Tensor
    cotangents: torch.Tensor


class AdapterReader:
    """Collects what an adapter's own layers contribute to their gradients.

    The gradient of a linear layer's weight is a product of the layer's inputs and the cotangents
    of its outputs: those of A have the inputs of the adapter, those of B the cotangents of the
    adapter's output, times the scale of the adapter. ``prefix`` is that of the parameters' names,
    ``max_bytes`` the largest size of the arrays of all samples.
    """

    def __init__(
        self,
        adapters: tuple[LowRankAdapter, ...],
        prefix: str,
        n_samples: int,
        n_outputs: int,
        max_bytes: int,
    ) -> None:
        self._adapters, self._prefix = adapters, prefix
        self._shape = n_samples, n_outputs
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._places = {
            prefix + name: (k, part)
            for k, a in enumerate(adapters)
            for part, name in enumerate((a.first, a.second))
        }
        # By adapter and part: the samples, the outputs and the tensor of each contribution.
        self.parts: list[tuple[list[_Part], list[_Part]]] = [([], []) for _ in adapters]

    def add(self, samples: slice, classes: slice, name: str, contribution: Unsummed) -> None:
        """Add a contribution to the gradient of a parameter, if it is a factor of an adapter."""
        if name not in self._places:
            return
        k, part = self._places[name]
        if not isinstance(contribution, Factors):
            raise ValueError(
                f"The low-rank adapter of {self._adapters[k].module!r} must call its linear "
                "layers lora_A and lora_B one after the other but got another computation, which "
                'the engine "columns" does not support. Use another engine, and SGD.'
            )
        if part == 0 and classes.start:
            # The inputs are the same for all outputs.
            return
        self._check_memory(samples)
        if part == 0:
            for source in contribution.sources:
                self._keep(k, 0, _Part(samples, slice(0, 0), source.detach()))
        else:
            for cotangent in contribution.cotangents:
                # From (B, 1, C, o, S) to (B, C, S, o).
                moved = cotangent[:, 0].transpose(2, 3)
                self._keep(k, 1, _Part(samples, classes, moved.detach()))

    def join(self, parts: Sequence[list[tuple[list[_Part], list[_Part]]]]) -> None:
        """Take over what several processes have collected, each of its part of the samples."""
        for k, (inputs, cotangents) in enumerate(self.parts):
            inputs[:] = [part for of_process in parts for part in of_process[k][0]]
            cotangents[:] = [part for of_process in parts for part in of_process[k][1]]

    def layers(self) -> Iterator[AdaptedLayer | None]:
        """Yield the arrays of each adapter, None for those that no output depends on.

        Positions that a sample lacks are zero. What was collected is released one by one.
        """
        n_samples, n_outputs = self._shape
        for inputs, cotangents in self.parts:
            if not cotangents:
                yield None
                continue
            x = _joined(inputs, (n_samples,))
            d = _joined(cotangents, (n_samples, n_outputs))
            inputs.clear()
            cotangents.clear()
            yield AdaptedLayer(x, d)

    def _keep(self, k: int, part: int, new: _Part) -> None:
        """Append a contribution, as a copy."""
        self.parts[k][part].append(_Part(new.samples, new.classes, new.values.contiguous()))
        self._n_bytes += new.values.nbytes

    def _check_memory(self, samples: slice) -> None:
        """Raise ValueError if the arrays of all samples would be too large."""
        if not samples.start:
            return
        expected = self._n_bytes * self._shape[0] / samples.start
        if expected > self._max_bytes:
            raise ValueError(
                "The inputs and cotangents of the layers with low-rank adapters must fit "
                f"max_memory, {self._max_bytes / 2**30:.3g} GiB, but take about "
                f"{expected / 2**30:.3g} GiB. Use fewer samples, task.subset(), or shorter texts."
            )


@dataclass(frozen=True, eq=False)
class _Part:
    """The values of some samples, ``(B, S, k)`` or, of some outputs, ``(B, C, S, o)``."""

    samples: slice
    classes: slice
    values: torch.Tensor


def _joined(parts: list[_Part], shape: tuple[int, ...]) -> torch.Tensor:
    """Return the values of all samples; several calls of a layer follow each other in S."""
    first = parts[0].values
    ends: dict[tuple[int, int], int] = {}
    starts = []
    for part in parts:
        key = (part.samples.start, part.classes.start)
        starts.append(ends.get(key, 0))
        ends[key] = starts[-1] + part.values.shape[-2]
    whole = first.new_zeros((*shape, max(ends.values()), first.shape[-1]))
    for part, start in zip(parts, starts, strict=True):
        where = slice(start, start + part.values.shape[-2])
        if len(shape) == 1:
            whole[part.samples, where] = part.values
        else:
            whole[part.samples, part.classes, where] = part.values
    return whole


def stored_layers(
    adapters: tuple[LowRankAdapter, ...],
    layers: Iterable[AdaptedLayer | None],
    validation: Iterable[AdaptedLayer | None],
    weights: Mapping[str, torch.Tensor],
) -> tuple[LowRankLayer, ...]:
    """Return the layers as arrays, in half precision unless they are in double precision.

    ``weights`` are all trainable parameters by the names that the adapters use, in order.
    """
    names = list(weights)
    stored = []
    for adapter, layer, others in zip(adapters, layers, validation, strict=True):
        if layer is None:
            continue
        scales = [_scale(layer.inputs), _scale(layer.cotangents)]
        held_out = {}
        if others is not None:
            held_out = {
                "validation_inputs": _codes(others.inputs, scales[0]),
                "validation_cotangents": _codes(others.cotangents, scales[1]),
            }
        first, second = (
            np.asarray(weights[n].detach().cpu().numpy()) for n in (adapter.first, adapter.second)
        )
        stored.append(
            LowRankLayer(
                inputs=_codes(layer.inputs, scales[0]),
                cotangents=_codes(layer.cotangents, scales[1]),
                scales=np.array(scales),
                first=first,
                second=second,
                parameters=np.array([names.index(adapter.first), names.index(adapter.second)]),
                **held_out,
            )
        )
    return tuple(stored)


def _scale(values: torch.Tensor) -> float:
    """Return the largest absolute value, or one if all are zero."""
    return float(values.abs().max()) or 1.0


def _codes(values: torch.Tensor, scale: float) -> NDArray[np.floating[Any]]:
    """Return values over their scale, in half precision unless they are in double precision."""
    precision = torch.float64 if values.dtype == torch.float64 else torch.float16
    return np.asarray((values / scale).to(precision).cpu().numpy())
