"""Which module answers for which parameter, checked against plain automatic differentiation.

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
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Any
from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._local_vjp import batched_arguments
from optuna_ttp.ntk.layers._local_vjp import local_rows
from optuna_ttp.ntk.layers._rules import Contribution
from optuna_ttp.ntk.layers._rules import rule_for
from optuna_ttp.ntk.layers._tape import Cotangents
from optuna_ttp.ntk.layers._tape import Recording
from optuna_ttp.ntk.layers._tape import Tape


if TYPE_CHECKING:
    from optuna_ttp.task import FrozenModel


# Relative deviation of a parameter's gradient that is rounding, and the same of all gradients
# together: some gradients are zero but for rounding.
_TOLERANCES = {torch.float32: (2e-3, 2e-6), torch.float64: (1e-8, 1e-12)}


@dataclass(frozen=True)
class Claim:
    """A module and the parameters it answers for.

    Attributes:
        module:
            Its name in the adapter; empty for the whole.
        kind:
            ``"rule"``, or a local derivative: ``"vmap"`` for all samples at once, ``"loop"`` for
            one after the other.
        parameters:
            Pairs of the name among the trainable parameters and the name in the module.
        expand:
            Its output is shared by all samples and given to each as a copy.
    """

    module: str
    kind: str
    parameters: tuple[tuple[str, str], ...]
    expand: bool = False


@dataclass(frozen=True)
class FactorShape:
    """Sizes of the factors of one sample's gradient of a weight matrix.

    Attributes:
        groups:
            G.
        width:
            Outputs ``o`` in a group.
        positions:
            ``S``, of all calls together.
        n_rows:
            Inputs ``k`` in a group.
        source_size:
            Elements of what the inputs are made from.
        is_table:
            The inputs are indices.
        transposed:
            How the weight is laid out.
    """

    groups: int
    width: int
    positions: int
    n_rows: int
    source_size: int
    is_table: bool
    transposed: bool

    @classmethod
    def of(cls, factors: Factors) -> FactorShape:
        """Return the shape of factors."""
        groups, _, width, positions, n_rows = factors.shape
        return cls(
            groups,
            width,
            positions,
            n_rows,
            sum(s[0].numel() for s in factors.sources),
            factors.expand is None,
            factors.transposed,
        )

    def plus(self, other: FactorShape | None) -> FactorShape | None:
        """Return the shape of the factors of a sum; nothing where the two do not fit together."""
        if other is None or self._layout() != other._layout():
            return None
        return replace(
            self,
            positions=self.positions + other.positions,
            source_size=self.source_size + other.source_size,
        )

    def _layout(self) -> tuple[int, int, int, bool, bool]:
        return self.groups, self.width, self.n_rows, self.is_table, self.transposed


@dataclass(frozen=True)
class Claims:
    """Who answers for every trainable parameter.

    Attributes:
        claims:
            All claims.
        copied:
            Modules whose inputs must be copied.
        unused:
            Parameters that no output depends on.
        shapes:
            Of the factors of each parameter's gradient for one sample; :obj:`None` where it only
            comes as a row.
        batched:
            For the n-th call of a module, which tensors among its arguments have an axis of
            samples.
        shared:
            For the n-th call of a module, whether its output is shared by all samples.
    """

    claims: tuple[Claim, ...]
    copied: frozenset[str]
    unused: tuple[str, ...]
    shapes: dict[str, FactorShape | None]
    batched: dict[tuple[str, int], tuple[bool, ...]]
    shared: dict[tuple[str, int], bool]

    def tape(self, frozen: FrozenModel) -> Tape:
        """Return a tape that watches the claiming modules."""
        watched: dict[str, bool] = {}
        for claim in self.claims:
            watched[claim.module] = watched.get(claim.module, False) or claim.expand
        return Tape(frozen, watched, self.copied, self.shared)

    @property
    def replayed(self) -> tuple[str, ...]:
        """Modules that are run again to differentiate them."""
        return tuple(dict.fromkeys(c.module for c in self.claims if c.kind != "rule"))

    def gradients(
        self, recording: Recording, cotangents: Cotangents
    ) -> Iterator[tuple[str, Contribution]]:
        """Yield every contribution to a parameter's gradient; those of one parameter add up.

        Args:
            recording:
                Of the tape.
            cotangents:
                Of the recording. Emptied on the way, to free their memory.
        """
        for module in list(cotangents):
            calls = zip(recording.calls[module], cotangents.pop(module), strict=True)
            for n, (call, parts) in enumerate(calls):
                if not call.is_intact:
                    raise _OverwrittenError(module)
                for claim in self.claims:
                    if claim.module == module:
                        yield from claim_gradients(
                            claim, call, parts, self.batched.get((module, n))
                        )


class _OverwrittenError(JacobianMismatchError):
    """The inputs of a module were overwritten after the call."""

    def __init__(self, module: str) -> None:
        super().__init__(
            f"The inputs of the layer {module!r} were overwritten by a later operation for some "
            "samples but not for others."
        )
        self.module = module


class UnclaimedError(JacobianMismatchError):
    """A layer cannot answer for its parameters for some of the samples.

    Args:
        names:
            Of the parameters.
        reason:
            What is wrong with the layer.
    """

    def __init__(self, names: Iterable[str], reason: str) -> None:
        self.names = frozenset(names)
        plain = ", ".join(sorted(n.removeprefix("model.") for n in self.names))
        super().__init__(f"The layers of {plain} {reason}.")


def claim_gradients(
    claim: Claim,
    call: Call,
    cotangents: list[list[torch.Tensor]],
    batched: tuple[bool, ...] | None = None,
) -> Iterator[tuple[str, Contribution]]:
    """Yield the gradients that one call contributes to the parameters of one claim.

    Args:
        claim:
            The claim.
        call:
            A call of its module.
        cotangents:
            For each output tensor, one a class.
        batched:
            Which tensors among the arguments have an axis of samples, where that is known.

    Raises:
        JacobianMismatchError:
            If the outputs of the module have no axis of samples.
    """
    if any(len(shape) == 0 or shape[0] != call.batch_size for shape in call.shapes):
        names = [name for name, _ in claim.parameters]
        raise UnclaimedError(names, "give outputs that have no axis of samples")
    if claim.kind == "rule":
        rule = rule_for(call.module)
        assert rule is not None
        found = rule(call, [d.to(call.dtype) for d in cotangents[0]])
        for name, local in claim.parameters:
            yield name, found[local]
        return
    locals_ = tuple(local for _, local in claim.parameters)
    loop = claim.kind == "loop"
    rows = local_rows(call, cotangents, locals_, loop=loop, batched=batched)
    for name, local in claim.parameters:
        yield name, rows[local]


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
        except _OverwrittenError as error:
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


_Options = list[list["Claim"]]


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


_Truth = list[dict[str, "torch.Tensor | None"]]


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
                    raise _OverwrittenError(module)
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
