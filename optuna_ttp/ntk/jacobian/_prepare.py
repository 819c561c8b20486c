"""The choice of claims and layout on a few samples, before all samples are differentiated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import TypeVar

import torch

from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.jacobian._claims import Claims
from optuna_ttp.ntk.jacobian._claims import UnclaimedError
from optuna_ttp.ntk.jacobian._find_claims import find_claims
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._layout import make_layout
from optuna_ttp.ntk.jacobian._rules import CHECKS
from optuna_ttp.ntk.jacobian._separable import is_separable
from optuna_ttp.ntk.jacobian._tape import Recording
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.task import tensors_of


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Preparation:
    """Claims, layout, and the bytes that one sample takes while it is differentiated."""

    claims: Claims
    layout: Layout
    bytes_per_sample: int


def prepare(
    task: FineTuningTask,
    frozen: FrozenModel,
    settings: EngineSettings,
    lifts: Mapping[str, int] | None = None,
) -> Preparation:
    """Differentiate a few samples to find claims, layout and the bytes of a sample.

    ``lifts`` are as for :func:`~optuna_ttp.ntk.jacobian._find_claims.find_claims`.
    """
    device, dtype, held = settings.device, settings.dtype, settings.held
    n_checked = min(CHECKS.n_claim_samples, task.n_samples)
    inputs, _ = next(task.batches(n_checked, device, dtype))
    if device.type == "cpu" and dtype == torch.float32 and n_checked > 1:
        frozen.try_channels_last(inputs)
    claims = find_claims(frozen, inputs, n_checked, settings.seed, lifts)
    itemsize = dtype.itemsize
    multipliers = dict(zip(frozen.parameters, task.multipliers.values(), strict=True))
    with claims.tape(frozen).attached() as tape:
        recording = tape.record(inputs, n_checked)
    layout = make_layout(
        {n: p.numel() for n, p in frozen.parameters.items() if n in claims.shapes},
        multipliers,
        claims.shapes,
        separable=_separable(claims, recording, settings.seed),
        n_samples=task.n_samples,
        n_outputs=task.n_outputs,
        itemsize=itemsize if held is None else held.itemsize,
        held=held,
    )
    batched = device.type == "cuda"
    replayed = set(claims.replayed)
    elements = 0
    for module, calls in recording.calls.items():
        # There are cotangents of one output at a time, or of all outputs and a copy of them.
        n_cotangents = 2 * task.n_outputs if batched or module in replayed else 1
        for call in calls:
            # Operations between layers keep about as many elements as they are given.
            elements += (n_cotangents + 1) * sum(s.numel() for s in call.shapes)
            elements += sum(t.numel() for t in tensors_of((call.args, call.kwargs)))
    per_sample = itemsize * (
        elements // n_checked + _gathered_elements(layout, claims, task.n_outputs)
    )
    return Preparation(claims, layout, per_sample)


def _gathered_elements(layout: Layout, claims: Claims, n_outputs: int) -> int:
    """Return the number of elements that one sample needs, beside its activations.

    These are cotangents of all outputs, unfolded inputs, and rows of local derivatives.
    """
    cotangents = unfolded = rows = 0
    for parameter in layout.parameters:
        shape = claims.shapes[parameter.name]
        if shape is None:
            rows = max(rows, n_outputs * parameter.n_weights)
        elif parameter.method in ("rows", "separable") and not shape.is_table:
            positions = shape.groups * shape.positions
            cotangents += n_outputs * shape.width * positions
            # The inputs of one parameter are unfolded at a time.
            unfolded = max(unfolded, shape.n_rows * positions)
    return cotangents + unfolded + rows


def _separable(claims: Claims, recording: Recording, seed: int) -> frozenset[str]:
    """Return the parameters with separable cotangents, by two random directions of the outputs."""
    n_outputs = recording.outputs.shape[1]
    if n_outputs == 1:
        return frozenset()
    generator = torch.Generator().manual_seed(seed)
    shape = (2, *recording.outputs.shape)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    cotangents = recording.cotangents(list(directions.to(recording.outputs)), retain_graph=True)
    for module in claims.replayed:
        cotangents.pop(module, None)
    calls: Counter[str] = Counter()
    separable: set[str] = set()
    for name, part in claims.gradients(recording, cotangents):
        calls[name] += 1
        if isinstance(part, Factors) and part.shape[3] > 1 and is_separable(part):
            separable.add(name)
    return frozenset(n for n in separable if calls[n] == 1)


def lifting(run: Callable[[Mapping[str, int]], _Result]) -> _Result:
    """Call ``run(lifts)`` until it raises no UnclaimedError, at most 21 times; return its result.

    A layer that only some samples reach, such as an expert, gives true gradients for the first
    samples but not for others. Each UnclaimedError adds one to the ``lifts`` of its parameters, so
    that :func:`prepare` takes the module around the layer.
    """
    lifts: Counter[str] = Counter()
    for _ in range(CHECKS.max_lifts):
        try:
            return run(lifts)
        except UnclaimedError as error:  # noqa: PERF203
            lifts.update(error.names)
    return run(lifts)
