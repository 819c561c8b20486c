"""The choice, on a few samples, of the module that computes each parameter's gradient.

The first choice is the rule of the layer that owns the parameter. If there is no rule, or its
gradient is not the true one (other code uses the parameter as well, or the layer's output has no
axis of samples), automatic differentiation of the layer alone is tried, then of the modules around
it, from the inside outwards. The last choice is the whole network, one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import replace
import math
from typing import Any
from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk.jacobian._claims import Claim
from optuna_ttp.ntk.jacobian._claims import claim_gradients
from optuna_ttp.ntk.jacobian._claims import Claims
from optuna_ttp.ntk.jacobian._claims import OverwrittenError
from optuna_ttp.ntk.jacobian._factor_shape import FactorShape
from optuna_ttp.ntk.jacobian._local_vjp import batched_arguments
from optuna_ttp.ntk.jacobian._rules import CHECKS
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._registry import rule_for


if TYPE_CHECKING:
    from optuna_ttp.task import FrozenModel


_Options = list[list[Claim]]
_Truth = list[dict[str, "torch.Tensor | None"]]


def find_claims(
    frozen: FrozenModel,
    inputs: Any,
    batch_size: int,
    seed: int,
    lifts: Mapping[str, int] | None = None,
) -> Claims:
    """Return for every parameter a claim of the innermost module with the true gradient.

    ``inputs`` are one batch of ``batch_size`` samples; ``seed`` is for the random directions in
    which gradients are compared. ``lifts`` gives, by parameter, the number of innermost modules to
    skip because they failed for other samples. JacobianMismatchError is raised if the whole
    network, differentiated sample by sample, does not give the true gradients either.
    """
    truth, outputs, directions = _true_gradients(frozen, inputs, seed)
    lifts = lifts or {}
    unused = tuple(
        n for n in frozen.parameters if n not in lifts and all(g[n] is None for g in truth)
    )
    chains = {n: c for n, c in _candidates(frozen).items() if n not in unused}
    levels = {n: _first_level(chain, lifts.get(n, 0)) for n, chain in chains.items()}
    copied: frozenset[str] = frozenset()
    while True:
        claims = Claims(_claims_at(chains, levels), copied, unused, {}, {}, {})
        try:
            wrong = _wrong_parameters(
                frozen, claims, inputs, batch_size, truth, outputs, directions
            )
        except OverwrittenError as error:
            if error.module in copied:
                raise
            copied = copied | {error.module}
            continue
        # A parameter in lifts moves outputs of other samples: its module must run for these too.
        wrong |= {n for n in lifts if n not in claims.shapes}
        if not wrong:
            return claims
        for name in wrong:
            levels[name] += 1
            if levels[name] == len(chains[name]):
                raise JacobianMismatchError(
                    f"The gradient of the parameter {name.removeprefix('model.')!r} is not the "
                    "same for the sample alone and in a batch. Samples must lie along the first "
                    "axis of all inputs (transpose them in the model or forward=), and the model "
                    "must keep nothing between calls."
                )


def _first_level(chain: _Options, n_lifts: int) -> int:
    """Return the index of the first option after skipping the ``n_lifts`` innermost modules."""
    modules = list(dict.fromkeys(tuple(c.module for c in option) for option in chain))
    if n_lifts >= len(modules):
        return len(chain) - 1
    return next(k for k, o in enumerate(chain) if tuple(c.module for c in o) == modules[n_lifts])


def _candidates(frozen: FrozenModel) -> dict[str, _Options]:
    """Return the options of each parameter in order; the claims of one option are added up."""
    owners: dict[str, list[str]] = {n: [] for n in frozen.parameters}
    modules = dict(frozen.adapter.named_modules(remove_duplicate=False))
    local_names: dict[tuple[str, str], str] = {}
    seen: set[tuple[int, str]] = set()
    for module_name, module in modules.items():
        for local, parameter in module._parameters.items():
            name = frozen.original_names.get(id(parameter), "")
            if name not in frozen.parameters:
                continue
            # A module with two names is hooked, and its calls are recorded, under one of them.
            if (id(module), name) in seen:
                continue
            seen.add((id(module), name))
            owners[name].append(module_name)
            local_names[(module_name, name)] = local
    return {
        name: _options(name, owners_of_it, modules, local_names)
        for name, owners_of_it in owners.items()
    }


def _options(
    name: str,
    owners: list[str],
    modules: dict[str, torch.nn.Module],
    local_names: dict[tuple[str, str], str],
) -> _Options:
    """Return a parameter's options in order: rule, local derivative, modules around its owners."""
    pairs = {owner: (name, local_names[(owner, name)]) for owner in owners}
    options: _Options = []
    rules = {owner: rule_for(modules[owner]) for owner in owners}
    if None not in rules.values():
        for expand in (False, True):
            options.append([Claim(o, "rule", (pairs[o],), expand, rules[o]) for o in owners])
    for kind in ("vmap", "loop"):
        options.append([Claim(o, kind, (pairs[o],)) for o in owners])
    above = _common_ancestor(owners)
    # A single owner is an option already.
    for ancestor in _ancestors(above, include_self=len(owners) > 1):
        inside = owners[0][len(ancestor) :].removeprefix(".")
        local = ".".join(filter(None, (inside, pairs[owners[0]][1])))
        for kind in ("vmap", "loop") if ancestor else ("loop",):
            options.append([Claim(ancestor, kind, ((name, local),))])
    return options


def _ancestors(name: str, *, include_self: bool) -> Iterator[str]:
    """Yield the names of the modules that contain a module, the innermost first, ``""`` last."""
    if include_self or not name:
        yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _common_ancestor(names: list[str]) -> str:
    """Return the name of the innermost module that contains all named modules."""
    split = [n.split(".") for n in names]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _claims_at(chains: dict[str, _Options], levels: dict[str, int]) -> tuple[Claim, ...]:
    """Return option ``levels[name]`` of each parameter, with one claim per module and kind."""
    joined: dict[tuple[str, str, bool], Claim] = {}
    for name, level in levels.items():
        for claim in chains[name][level]:
            key = (claim.module, claim.kind, claim.expand)
            before = joined[key].parameters if key in joined else ()
            joined[key] = replace(joined.get(key, claim), parameters=before + claim.parameters)
    return tuple(joined.values())


def _true_gradients(
    frozen: FrozenModel, inputs: Any, seed: int
) -> tuple[_Truth, torch.Tensor, torch.Tensor]:
    """Return gradients ``J_b^T u_b`` of each sample ``b``, outputs and random directions ``u``.

    The gradients are dictionaries by parameter, computed by plain reverse mode; outputs and
    directions are ``(B, C)``. The batch is as large as with the tape, because in batches of other
    sizes a unit may be rounded to the other side of a kink.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = frozen.parameters
    outputs = frozen(inputs)
    frozen.find_precision(outputs)
    directions = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    truth: _Truth = []
    for b in range(len(outputs)):
        gradients = torch.autograd.grad(
            outputs[b] @ directions[b],
            list(parameters.values()),
            retain_graph=b + 1 < len(outputs),
            allow_unused=True,
        )
        truth.append(dict(zip(parameters, gradients, strict=True)))
    return truth, outputs.detach(), directions


def _wrong_parameters(
    frozen: FrozenModel,
    claims: Claims,
    inputs: Any,
    batch_size: int,
    truth: _Truth,
    outputs: torch.Tensor,
    directions: torch.Tensor,
) -> set[str]:
    """Return parameters whose claims fail or differ from ``truth``; fill in ``claims.shapes``."""
    expanded = {n for c in claims.claims if c.expand for n, _ in c.parameters}
    claimed: dict[str, torch.Tensor | None] = {}
    wrong: set[str] = set()
    with claims.tape(frozen).attached() as tape:
        try:
            recording = tape.record(inputs, batch_size)
        except Exception:
            # The only change is that shared outputs have copies, with which any module may fail.
            if not expanded:
                raise
            return expanded
        if expanded and not _close(recording.outputs.detach(), outputs):
            return expanded
        cotangents = recording.cotangents([directions])
        for module, calls in recording.calls.items():
            for n, (call, parts) in enumerate(zip(calls, cotangents[module], strict=True)):
                if not call.is_intact:
                    raise OverwrittenError(module)
                claims.batched[(module, n)] = batched_arguments(call)
                for claim in claims.claims:
                    if claim.module != module:
                        continue
                    names = {n for n, _ in claim.parameters}
                    try:
                        for name, part in claim_gradients(claim, call, parts):
                            shape = FactorShape.of(part) if isinstance(part, Factors) else None
                            rows = part if isinstance(part, torch.Tensor) else part.rows()
                            total = claimed.get(name)
                            if total is not None:
                                known = claims.shapes[name]
                                shape = None if known is None else known.plus(shape)
                                rows = total + rows
                            claims.shapes[name], claimed[name] = shape, rows
                    except Exception:
                        # A module may raise any exception if it is given parts of its inputs.
                        wrong |= names
    return wrong | set(_deviating(claimed, truth, wrong, frozen.precision))


def _deviating(
    claimed: dict[str, torch.Tensor | None], truth: _Truth, skip: set[str], precision: torch.dtype
) -> Iterable[str]:
    """Yield parameters not in ``skip`` whose gradient deviates by more than rounding."""
    relative, absolute = CHECKS.claim_tolerances[precision]
    for b, gradients in enumerate(map(_dense, truth)):
        norms = {n: float(g.norm()) for n, g in gradients.items()}
        total = math.hypot(*norms.values())
        # Gradients that are not finite raise an error later, which names the sample.
        if not math.isfinite(total):
            continue
        for name, gradient in gradients.items():
            if name in skip:
                continue
            rows = claimed.get(name)
            if rows is None:
                if norms[name] > 0.0:
                    yield name
                continue
            away = float((rows[b, 0] - gradient.flatten()).norm())
            if not away <= relative * norms[name] + absolute * total:
                yield name


def _dense(gradients: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Return the gradients that are not None, sparse ones as dense tensors."""
    return {
        n: g if g.layout == torch.strided else g.to_dense()
        for n, g in gradients.items()
        if g is not None
    }


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two outputs of shape ``(B, C)`` are equal up to rounding."""
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= 1e-3 * float(other.abs().max()) + 1e-5
