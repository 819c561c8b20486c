"""Parameters that have a learning rate and a weight decay of their own."""

from __future__ import annotations

from dataclasses import dataclass
import math

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_number
from optuna_ttp._util.checks import check_range


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a factor on the learning rate, and a weight decay.

    Example:
        >>> head = ParameterGroup(("head.weight", "head.bias"), rate=10.0)
        >>> body = ParameterGroup(("body.weight", "body.bias"), weight_decay=0.0)
        >>> optimizer = AdamW(groups=(body, head))

    Args:
        names:
            The names of the parameters, as ``model.named_parameters()`` gives them.
        rate:
            The factor on the learning rate of a configuration. One by default; zero for
            parameters that stay as they are.
        weight_decay:
            The weight decay of these parameters. That of the optimiser by default.

    Raises:
        TypeError:
            If an argument is not of its type.
        ValueError:
            If an argument is out of its range.
    """

    names: tuple[str, ...]
    rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_kind("names", self.names, tuple)
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"names must be the names of parameters but got {name!r}.")
        check_number("rate", self.rate)
        if not (math.isfinite(self.rate) and self.rate >= 0.0):
            raise ValueError(f"rate must be finite and not negative but got {self.rate}.")
        if self.weight_decay is not None:
            check_range("weight_decay", self.weight_decay, high=1e300)


def check_groups(groups: object) -> None:
    """Raise unless the groups are a tuple of at least one group, each with other parameters."""
    if groups is None:
        return
    if not isinstance(groups, tuple) or not groups:
        raise TypeError(f"groups must be a tuple of ParameterGroup but got {groups!r}.")
    seen: set[str] = set()
    for group in groups:
        check_kind("groups", group, ParameterGroup)
        twice = seen.intersection(group.names)
        if twice:
            raise ValueError(f"groups must not share parameters but got {min(twice)!r} twice.")
        seen.update(group.names)


def check_coverage(groups: tuple[ParameterGroup, ...] | None, names: tuple[str, ...]) -> None:
    """Raise ValueError unless the groups hold exactly the trainable parameters with ``names``."""
    if groups is None:
        return
    grouped = {name for group in groups for name in group.names}
    missing = [name for name in names if name not in grouped]
    unknown = sorted(grouped - set(names))
    if missing:
        raise ValueError(
            "groups must hold all trainable parameters but got none for "
            f"{', '.join(map(repr, missing[:3]))}{' and others' if len(missing) > 3 else ''}. Add "
            "them to a group, with the factor rate=0 if they are not trained."
        )
    if unknown:
        raise ValueError(
            "groups must name trainable parameters of the task's model but got "
            f"{', '.join(map(repr, unknown[:3]))}. Its parameters are, for instance, "
            f"{', '.join(map(repr, names[:3]))}."
        )
