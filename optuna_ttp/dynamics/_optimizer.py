"""What all optimisers have in common."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from dataclasses import dataclass
from dataclasses import field
import math
from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_number
from optuna_ttp.dynamics._parameter_group import check_groups


if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from optuna_ttp.dynamics._adam_configurations import AdamConfigurations
    from optuna_ttp.dynamics._parameter_group import ParameterGroup
    from optuna_ttp.dynamics._schedule import Schedule
    from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations


@dataclass(frozen=True)
class Optimizer(ABC):
    """The settings that :class:`SGD`, :class:`Adam` and :class:`AdamW` have in common.

    Args:
        max_grad_norm:
            The largest norm of the gradient of all weights, to which
            :func:`torch.nn.utils.clip_grad_norm_` shortens longer ones. :obj:`None`, the default,
            for no clipping.
        accumulation_steps:
            The number of mini-batches whose mean gradients are averaged for one step of the
            optimiser. The last step of an epoch may have fewer. One by default.
        groups:
            Parameters that have a learning rate or a weight decay of their own. :obj:`None`, the
            default, if all have the same. They must hold all trainable parameters.
    """

    max_grad_norm: float | None = field(default=None, kw_only=True)
    accumulation_steps: int = field(default=1, kw_only=True)
    groups: tuple[ParameterGroup, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm)
            if not self.max_grad_norm > 0.0:
                raise ValueError(
                    f"max_grad_norm must be positive but got {self.max_grad_norm}. Give None for "
                    "no clipping."
                )
        check_count("accumulation_steps", self.accumulation_steps)
        check_groups(self.groups)

    @property
    @abstractmethod
    def default_momentum(self) -> float | None:
        """The momentum of configurations without one; None if every trial must give one."""

    @property
    @abstractmethod
    def acts_on_single_weights(self) -> bool:
        """True if a step depends on more than the kernel: on the columns of the Jacobian."""

    @abstractmethod
    def configurations(
        self,
        learning_rate: ArrayLike,
        momentum: ArrayLike,
        schedule: Schedule | None = None,
    ) -> SGDConfigurations | AdamConfigurations:
        """Return K configurations of this optimiser for a simulation.

        Args:
            learning_rate:
                One learning rate, or an array of shape ``(K,)``.
            momentum:
                One momentum, or an array of shape ``(K,)``; ``beta_1`` of Adam.
            schedule:
                The schedule of the learning rate. Constant by default.

        Returns:
            The configurations.
        """


def check_decay(weight_decay: float) -> None:
    """Raise TypeError or ValueError unless a weight decay is a number that is not negative."""
    check_number("weight_decay", weight_decay)
    if not (math.isfinite(weight_decay) and weight_decay >= 0.0):
        raise ValueError(f"weight_decay must be finite and not negative but got {weight_decay}.")
