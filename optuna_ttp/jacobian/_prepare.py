"""What every engine needs to know of a network before it differentiates all samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optuna_ttp.jacobian._claims import Claims
from optuna_ttp.jacobian._claims import find_claims
from optuna_ttp.jacobian._layout import Layout
from optuna_ttp.jacobian._layout import make_layout
from optuna_ttp.jacobian._tree import tensors_of


if TYPE_CHECKING:
    from optuna_ttp.frozen_model import FrozenModel
    from optuna_ttp.task import FineTuningTask


# Samples on which gradients of layers are compared with those of the whole network.
_N_CHECKED = 3


@dataclass(frozen=True)
class Preparation:
    """What a look at a few samples has shown.

    Attributes:
        claims:
            Who answers for which parameter.
        layout:
            How each parameter is held.
        bytes_per_sample:
            Activations, cotangents and rows of one sample while it is differentiated.
    """

    claims: Claims
    layout: Layout
    bytes_per_sample: int


def prepare(
    task: FineTuningTask,
    frozen: FrozenModel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Preparation:
    """Look at a few samples.

    Args:
        task:
            What is fine-tuned.
        frozen:
            The borrowed model.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian.
        seed:
            Of the random directions in which gradients are compared.

    Returns:
        Claims, layout and what a sample takes.
    """
    n_checked = min(_N_CHECKED, task.n_samples)
    inputs, _ = next(task.batches(n_checked, device, dtype))
    claims = find_claims(frozen, inputs, n_checked, seed)
    itemsize = torch.empty((), dtype=dtype).element_size()
    multipliers = dict(zip(frozen.parameters, task.multipliers.values(), strict=True))
    layout = make_layout(
        {n: p.numel() for n, p in frozen.parameters.items() if n in claims.shapes},
        multipliers,
        claims.shapes,
        n_samples=task.n_samples,
        n_outputs=task.n_outputs,
        itemsize=itemsize,
    )
    with claims.tape(frozen).attached() as tape:
        recording = tape.record(inputs, n_checked)
    batched = device.type == "cuda"
    replayed = set(claims.replayed)
    elements = 0
    for module, calls in recording.calls.items():
        n_classes = task.n_outputs if batched or module in replayed else 1
        for call in calls:
            width = sum(s.numel() for s in call.shapes)
            # Cotangents twice, because they are brought into order; the activation itself, and
            # what its derivative needs.
            elements += (2 * n_classes + 3) * width
            elements += sum(t.numel() for t in tensors_of((call.args, call.kwargs)))
    # Rows are made when the cotangents of all outputs are there.
    unfolded = sum(
        shape.groups * shape.positions * (shape.n_rows + task.n_outputs * shape.width)
        for parameter in layout.parameters
        if parameter.method == "rows"
        and (shape := claims.shapes[parameter.name]) is not None
        and not shape.is_table
    )
    largest = max((p.size for p in layout.parameters if p.method == "rows"), default=0)
    per_sample = itemsize * (elements // n_checked + unfolded + task.n_outputs * largest)
    return Preparation(claims, layout, per_sample)
