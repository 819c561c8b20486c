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
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._registry import rule_for


if TYPE_CHECKING:
    from optuna_ttp.task import FrozenModel


# Relative deviation of a parameter's gradient that is rounding, and the same of all gradients
# together: some gradients are zero but for rounding.
_TOLERANCES = {torch.float32: (2e-3, 2e-6), torch.float64: (1e-8, 1e-12)}

_Options = list[list[Claim]]
_Truth = list[dict[str, "torch.Tensor | None"]]


def find_claims(
    frozen: FrozenModel,
    inputs: Any,
    batch_size: int,
    seed: int,
    lifts: Mapping[str, int] | None = None,
) -> Claims:
    """Find out which modules answer for which parameters, on a few samples.

    Args:
        frozen:
            The borrowed model.
        inputs:
            A few samples as one batch.
        batch_size:
            How many.
        seed:
            Of the random directions in which gradients are compared.
        lifts:
            How many modules around a parameter's own have to be passed over, because they were
            found to be wrong for other samples. None by default.

    Returns:
        Claims whose gradients are the true ones for these samples.

    Raises:
        JacobianMismatchError:
            If not even the whole network, sample by sample, gives the true gradients.
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
        # What only other samples reach must still be answered for by a module that runs.
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
    """The first option whose module is so many steps further out than the first one."""
    modules = list(dict.fromkeys(tuple(c.module for c in option) for option in chain))
    if n_lifts >= len(modules):
        return len(chain) - 1
    return next(k for k, o in enumerate(chain) if tuple(c.module for c in o) == modules[n_lifts])


def _candidates(frozen: FrozenModel) -> dict[str, _Options]:
    """For each trainable parameter what to try in turn: lists of claims that add up."""
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
    return {name: _options(name, own, modules, local_names) for name, own in owners.items()}


def _options(
    name: str,
    owners: list[str],
    modules: dict[str, torch.nn.Module],
    local_names: dict[tuple[str, str], str],
) -> _Options:
    pairs = {owner: (name, local_names[(owner, name)]) for owner in owners}
    options: _Options = []
    if all(rule_for(modules[owner]) is not None for owner in owners):
        for expand in (False, True):
            options.append([Claim(o, "rule", (pairs[o],), expand) for o in owners])
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
    if include_self or not name:
        yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _common_ancestor(names: list[str]) -> str:
    split = [n.split(".") for n in names]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _claims_at(chains: dict[str, _Options], levels: dict[str, int]) -> tuple[Claim, ...]:
    """Claims of the same module and kind together, so that it is run again only once."""
    grouped: dict[tuple[str, str, bool], list[tuple[str, str]]] = {}
    for name, level in levels.items():
        for claim in chains[name][level]:
            key = (claim.module, claim.kind, claim.expand)
            grouped.setdefault(key, []).extend(claim.parameters)
    return tuple(
        Claim(module, kind, tuple(parameters), expand)
        for (module, kind, expand), parameters in grouped.items()
    )


def _true_gradients(
    frozen: FrozenModel, inputs: Any, seed: int
) -> tuple[_Truth, torch.Tensor, torch.Tensor]:
    """Each sample's gradient in a random direction of the outputs, by plain reverse mode.

    Through the same batch as the tape's: in a batch of another size a unit may be rounded to the
    other side of a kink.
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
    """Parameters whose claimed gradient is not the true one, or cannot be had."""
    expanded = {n for c in claims.claims if c.expand for n, _ in c.parameters}
    found: dict[str, torch.Tensor | None] = {}
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
                            total = found.get(name)
                            if total is not None:
                                known = claims.shapes[name]
                                shape = None if known is None else known.plus(shape)
                                rows = total + rows
                            claims.shapes[name], found[name] = shape, rows
                    except Exception:
                        # On parts of its inputs a module may raise anything.
                        wrong |= names
    return wrong | set(_deviating(found, truth, wrong, frozen.precision))


def _deviating(
    found: dict[str, torch.Tensor | None], truth: _Truth, skip: set[str], precision: torch.dtype
) -> Iterable[str]:
    relative, absolute = _TOLERANCES[precision]
    for b, gradients in enumerate(map(_dense, truth)):
        norms = {n: float(g.norm()) for n, g in gradients.items()}
        total = math.hypot(*norms.values())
        # What is not finite is refused later, with the sample's number.
        if not math.isfinite(total):
            continue
        for name, gradient in gradients.items():
            if name in skip:
                continue
            rows = found.get(name)
            if rows is None:
                if norms[name] > 0.0:
                    yield name
                continue
            away = float((rows[b, 0] - gradient.flatten()).norm())
            if not away <= relative * norms[name] + absolute * total:
                yield name


def _dense(gradients: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {
        n: g if g.layout == torch.strided else g.to_dense()
        for n, g in gradients.items()
        if g is not None
    }


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= 1e-3 * float(other.abs().max()) + 1e-5
