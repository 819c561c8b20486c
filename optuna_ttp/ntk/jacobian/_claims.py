"""Claims: the modules that compute the gradients of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk.jacobian._factor_shape import FactorShape
from optuna_ttp.ntk.jacobian._local_vjp import local_rows
from optuna_ttp.ntk.jacobian._tape import Cotangents
from optuna_ttp.ntk.jacobian._tape import Recording
from optuna_ttp.ntk.jacobian._tape import Tape
from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import Contribution
from optuna_ttp.ntk.layers._rule import Rule
from optuna_ttp.ntk.layers._rule import Unsummed
from optuna_ttp.ntk.layers._sums import Sums


if TYPE_CHECKING:
    from optuna_ttp.task import FrozenModel


@dataclass(frozen=True)
class Claim:
    """A module and the parameters whose gradients it computes.

    ``module`` is its name in the adapter, empty for the whole network. ``kind`` is ``"rule"``, or
    a local derivative: ``"vmap"`` for all samples at once, ``"loop"`` for one at a time.
    ``parameters`` are pairs of the name among the trainable parameters and the name in the module.
    With ``expand`` an output that all samples share is replaced by one copy per sample.
    """

    module: str
    kind: str
    parameters: tuple[tuple[str, str], ...]
    expand: bool = False
    rule: Rule | None = None


@dataclass(frozen=True)
class Claims:
    """The claims for all trainable parameters, with properties of the modules' calls.

    Inputs of the modules ``copied`` must be copied; no output depends on the parameters
    ``unused``. ``shapes`` are the shapes of the factors of each parameter's gradient for one
    sample, :obj:`None` if the gradient is a row. By module and number of the call, ``batched`` has
    one flag per tensor among the arguments, True if it has an axis of samples, and ``shared`` is
    True if all samples share the output.
    """

    claims: tuple[Claim, ...]
    copied: frozenset[str]
    unused: tuple[str, ...]
    shapes: dict[str, FactorShape | None]
    batched: dict[tuple[str, int], tuple[bool, ...]]
    shared: dict[tuple[str, int], bool]

    def tape(self, frozen: FrozenModel) -> Tape:
        """Return a tape that records the calls of the claiming modules."""
        watched: dict[str, bool] = {}
        for claim in self.claims:
            watched[claim.module] = watched.get(claim.module, False) or claim.expand
        return Tape(frozen, watched, self.copied, self.shared)

    @property
    def replayed(self) -> tuple[str, ...]:
        """Return the names of the modules without a rule, which run again to be differentiated."""
        return tuple(dict.fromkeys(c.module for c in self.claims if c.kind != "rule"))

    def gradients(
        self, recording: Recording, cotangents: Cotangents
    ) -> Iterator[tuple[str, Contribution]]:
        """Yield parameters' names with contributions to their gradients, which add up.

        ``cotangents`` is emptied module by module, to free memory.
        """
        for name, part in self.unsummed(recording, cotangents):
            yield name, part.rows() if isinstance(part, Sums) else part

    def unsummed(
        self, recording: Recording, cotangents: Cotangents
    ) -> Iterator[tuple[str, Unsummed]]:
        """Yield what :meth:`gradients` yields, with scales and shifts as sums to be computed."""
        for module in list(cotangents):
            calls = zip(recording.calls[module], cotangents.pop(module), strict=True)
            for n, (call, parts) in enumerate(calls):
                if not call.is_intact:
                    raise OverwrittenError(module)
                flags = self.batched.get((module, n))
                for claim in self.claims:
                    if claim.module == module:
                        yield from claim_gradients(claim, call, parts, flags)


class OverwrittenError(JacobianMismatchError):
    """Raised if the inputs of a module were overwritten after the call."""

    def __init__(self, module: str) -> None:
        super().__init__(
            f"The inputs of the layer {module!r} were overwritten by a later operation for some "
            "samples but not for others."
        )
        self.module = module


class UnclaimedError(JacobianMismatchError):
    """Raised if a claim does not give the gradients of ``names`` for some of the samples."""

    def __init__(self, names: Iterable[str], reason: str) -> None:
        self.names = frozenset(names)
        plain = ", ".join(sorted(n.removeprefix("model.") for n in self.names))
        super().__init__(f"The layers of {plain} {reason}.")


def claim_gradients(
    claim: Claim,
    call: Call,
    cotangents: list[list[torch.Tensor]],
    batched: tuple[bool, ...] | None = None,
) -> Iterator[tuple[str, Unsummed]]:
    """Yield the gradients that one call contributes to the parameters of one claim.

    ``cotangents`` has one list per output tensor of the call, with one cotangent per class.
    ``batched`` has one flag per tensor among the arguments, True if it has an axis of samples
    (None if unknown). UnclaimedError is raised if the module's outputs have no axis of samples.
    """
    if any(len(shape) == 0 or shape[0] != call.batch_size for shape in call.shapes):
        names = [name for name, _ in claim.parameters]
        raise UnclaimedError(names, "give outputs that have no axis of samples")
    if claim.kind == "rule":
        assert claim.rule is not None
        gradients = claim.rule(call, [d.to(call.dtype) for d in cotangents[0]])
        for name, local in claim.parameters:
            yield name, gradients[local]
        return
    locals_ = tuple(local for _, local in claim.parameters)
    loop = claim.kind == "loop"
    rows = local_rows(call, cotangents, locals_, loop=loop, batched=batched)
    for name, local in claim.parameters:
        yield name, rows[local]
