"""Finding out which module answers for which parameter, on a few samples.

A parameter belongs to the layer that owns it, if there is a rule for that layer. Where there is
none, or the rule's gradient is not the true one (the parameter is used by other code than the
layer's own, the layer's output has no axis of samples, its inputs were overwritten), the layer is
differentiated on its own; where that is wrong as well, the module around it, and so on up to the
whole network, sample by sample, which is right for everything that can be differentiated.
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
    """Find, on a few samples, the innermost modules whose gradients are the true ones.

    ``inputs`` are ``batch_size`` samples as one batch, and ``seed`` that of the directions in
    which gradients are compared. ``lifts`` says, by parameter, how many modules around its layer
    are passed over because they were wrong for other samples. JacobianMismatchError is raised if
    not even the whole network, sample by sample, gives the true gradients.
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
        # Parameters that only other samples reach still need a module that runs for these.
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
    """Return the first option whose module lies some steps further out than the first one."""
    modules = list(dict.fromkeys(tuple(c.module for c in option) for option in chain))
    if n_lifts >= len(modules):
        return len(chain) - 1
    return next(k for k, o in enumerate(chain) if tuple(c.module for c in o) == modules[n_lifts])


def _candidates(frozen: FrozenModel) -> dict[str, _Options]:
    """Return, for each trainable parameter, what to try in turn: lists of claims that add up."""
    owners: dict[str, list[str]] = {n: [] for n in frozen.parameters}
    modules = dict(frozen.adapter.named_modules(remove_duplicate=False))
    local_names: dict[tuple[str, str], str] = {}
    seen: set[tuple[int, str]] = set()
    for module_name, module in modules.items():
        for local, parameter in module._parameters.items():
            name = frozen.original_names.get(id(parameter), "")
            if name not in frozen.parameters:
                continue
            # The same module under two names is called, and hooked, once.
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
    """Return the claims to try for one parameter: rule, local derivative, modules around it."""
    pairs = {owner: (name, local_names[(owner, name)]) for owner in owners}
    options: _Options = []
    rules = {owner: rule_for(modules[owner]) for owner in owners}
    if None not in rules.values():
        for expand in (False, True):
            options.append([Claim(o, "rule", (pairs[o],), expand, rules[o]) for o in owners])
    for kind in ("vmap", "loop"):
        options.append([Claim(o, kind, (pairs[o],)) for o in owners])
    above = _common_ancestor(owners)
    # The owner itself has been tried.
    for ancestor in _ancestors(above, include_self=len(owners) > 1):
        inside = owners[0][len(ancestor) :].removeprefix(".")
        local = ".".join(filter(None, (inside, pairs[owners[0]][1])))
        for kind in ("vmap", "loop") if ancestor else ("loop",):
            options.append([Claim(ancestor, kind, ((name, local),))])
    return options


def _ancestors(name: str, *, include_self: bool) -> Iterator[str]:
    """Yield the names of the modules around a module, from the inside to the whole network."""
    if include_self or not name:
        yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _common_ancestor(names: list[str]) -> str:
    """Return the name of the innermost module that contains all of some modules."""
    split = [n.split(".") for n in names]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _claims_at(chains: dict[str, _Options], levels: dict[str, int]) -> tuple[Claim, ...]:
    """Return the chosen claims; those of one module and kind are joined, so that it runs once."""
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
    """Return each sample's gradient in a random direction of the outputs, by plain reverse mode.

    The outputs and the directions, both ``(B, C)``, come with it. All samples go through the
    network in the same batch as with the tape: in a batch of another size a unit may be rounded to
    the other side of a kink.
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
    """Return the parameters whose claimed gradient is not the true one, or cannot be computed."""
    expanded = {n for c in claims.claims if c.expand for n, _ in c.parameters}
    claimed: dict[str, torch.Tensor | None] = {}
    wrong: set[str] = set()
    with claims.tape(frozen).attached() as tape:
        try:
            recording = tape.record(inputs, batch_size)
        except Exception:
            # The only difference from before are the copies, on which a module may raise anything.
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
                            rows = part.rows() if isinstance(part, Factors) else part
                            total = claimed.get(name)
                            if total is not None:
                                known = claims.shapes[name]
                                shape = None if known is None else known.plus(shape)
                                rows = total + rows
                            claims.shapes[name], claimed[name] = shape, rows
                    except Exception:
                        # A module may raise anything when it is given parts of its inputs.
                        wrong |= names
    return wrong | set(_deviating(claimed, truth, wrong, frozen.precision))


def _deviating(
    claimed: dict[str, torch.Tensor | None], truth: _Truth, skip: set[str], precision: torch.dtype
) -> Iterable[str]:
    """Yield the parameters whose gradient differs from the true one by more than rounding."""
    relative, absolute = CHECKS.claim_tolerances[precision]
    for b, gradients in enumerate(map(_dense, truth)):
        norms = {n: float(g.norm()) for n, g in gradients.items()}
        total = math.hypot(*norms.values())
        # What is not finite is refused later, with the sample's number.
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
    """Return the gradients that there are, sparse ones as dense tensors."""
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
