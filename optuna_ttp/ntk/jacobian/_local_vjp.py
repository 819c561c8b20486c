"""Gradients of any module's parameters by differentiating that module alone, sample by sample."""

from __future__ import annotations

from typing import Any
import warnings

import torch
from torch.func import vjp
from torch.func import vmap

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.task import functional_call
from optuna_ttp.task import map_tensors
from optuna_ttp.task import tensors_of


def local_rows(
    call: Call,
    cotangents: list[list[torch.Tensor]],
    names: tuple[str, ...],
    *,
    loop: bool,
    batched: tuple[bool, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """Run a module again for each sample alone; return rows ``(B, C, p)`` of the named parameters.

    ``cotangents`` has one list per output tensor that carries a gradient, with one cotangent per
    class. With ``loop`` samples go one at a time in plain reverse mode, which any module allows;
    otherwise all at once by :func:`torch.func.vmap`. ``batched`` has one flag per tensor among the
    arguments, True to split it by samples: by default if its first axis is as long as the batch.
    """
    stacked = [torch.stack(per_class, 1) for per_class in cotangents]
    flags = batched_arguments(call)
    if batched is not None and len(batched) == len(flags):
        # Another axis may have the length of this batch by chance.
        flags = batched
    differentiate = _looped if loop else _vectorised
    rows = differentiate(call, stacked, names, flags)
    return {name: r.reshape(*r.shape[:2], -1) for name, r in zip(names, rows, strict=True)}


def batched_arguments(call: Call) -> tuple[bool, ...]:
    """Return one flag per tensor among the arguments: its first axis is as long as the batch."""
    tensors = tensors_of((call.args, call.kwargs))
    return tuple(t.ndim > 0 and len(t) == call.batch_size for t in tensors)


def _vectorised(
    call: Call,
    cotangents: list[torch.Tensor],
    names: tuple[str, ...],
    batched: tuple[bool, ...],
) -> list[torch.Tensor]:
    """Return rows ``(B, C, *shape)`` of each parameter, for all samples at once."""
    tensors = tensors_of((call.args, call.kwargs))

    def one_sample(
        parts: list[torch.Tensor], directions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        def outputs(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            remaining = iter(parts)
            pick = iter(batched)

            def fill(tensor: torch.Tensor) -> torch.Tensor:
                part = next(remaining)[None] if next(pick) else tensor
                # The module may write to it.
                return part.clone() if call.is_copied else part

            args, kwargs = map_tensors((call.args, call.kwargs), fill, keep_types=True)
            return _run(call, weights, args, kwargs)

        _, pull, *_ = vjp(outputs, {name: call.state[name].detach() for name in names})
        (gradients,) = vmap(pull)(tuple(d[:, None] for d in directions))
        return [gradients[name] for name in names]

    parts = [t for t, flag in zip(tensors, batched, strict=True) if flag]
    with warnings.catch_warnings():
        # PyTorch loops over operations without a vectorised derivative, which is slower.
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        # If weights of other modules are among the arguments, the rows have a graph.
        return [r.detach() for r in vmap(one_sample)(parts, cotangents)]


def _looped(
    call: Call,
    cotangents: list[torch.Tensor],
    names: tuple[str, ...],
    batched: tuple[bool, ...],
) -> list[torch.Tensor]:
    """Return rows ``(B, C, *shape)`` of each parameter, for one sample at a time."""
    n_classes = cotangents[0].shape[1]
    rows: list[list[torch.Tensor]] = [[] for _ in names]
    for b in range(call.batch_size):
        flags = iter(batched)

        def pick(tensor: torch.Tensor, b: int = b, flags: Any = flags) -> torch.Tensor:
            part = tensor[b : b + 1] if next(flags) else tensor
            # The module may write to it.
            return part.clone() if call.is_copied else part

        args, kwargs = map_tensors((call.args, call.kwargs), pick, keep_types=True)
        weights = {name: call.state[name].detach().requires_grad_() for name in names}
        outputs = _run(call, weights, args, kwargs)
        # Outputs that do not depend on the weights for this sample have no graph.
        moved = [k for k, output in enumerate(outputs) if output.requires_grad]
        if not moved:
            for part, weight in zip(rows, weights.values(), strict=True):
                part.extend([torch.zeros_like(weight)] * n_classes)
            continue
        for c in range(n_classes):
            gradients = torch.autograd.grad(
                [outputs[k] for k in moved],
                list(weights.values()),
                [cotangents[k][b : b + 1, c] for k in moved],
                retain_graph=c + 1 < n_classes,
                allow_unused=True,
                materialize_grads=True,
            )
            for part, gradient in zip(rows, gradients, strict=True):
                dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
                part.append(dense)
    return [torch.stack(part).unflatten(0, (call.batch_size, n_classes)) for part in rows]


def _run(
    call: Call, weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Run a call's module again with other ``weights``; return the outputs that carry gradients.

    Tied parameters stay one tensor, and parameters without a new weight are constants.
    """
    by_identity = {id(t): t.detach() for t in call.state.values()}
    by_identity.update({id(call.state[name]): weight for name, weight in weights.items()})
    state = {n: by_identity[id(t)] for n, t in call.state.items()}
    tensors = tensors_of(functional_call(call.module, state, args, kwargs))
    return tuple(tensors[i] for i in call.positions)
