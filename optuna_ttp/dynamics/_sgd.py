"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_number
from optuna_ttp.dynamics._optimizer import check_decay
from optuna_ttp.dynamics._optimizer import Optimizer
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations


if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from optuna_ttp.dynamics._schedule import Schedule


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent as :class:`torch.optim.SGD` does it.

    It holds the settings that all trials of a search share. The learning rate and the batch size
    are given with each configuration, and the momentum may be.

    Example:
        >>> predictor = TrainingTimePredictor(
        ...     spectrum, target_fraction=0.2, optimizer=SGD(momentum=0.9, nesterov=True)
        ... )

    Args:
        momentum:
            The momentum of configurations and trials that do not give one themselves, in [0, 1).
            By default it is zero for predictions, and a trial must have one.
        nesterov:
            True for Nesterov's momentum. False by default.
        dampening:
            The dampening of the momentum, in [0, 1). Zero by default.
        weight_decay:
            The L2 weight decay. Zero by default. With learning-rate multipliers the decay of the
            weights' change is approximate, that of the pretrained weights is exact.
        max_grad_norm:
            The norm to which longer gradients are shortened. No clipping by default. See
            :class:`~optuna_ttp.dynamics.Optimizer`.
        accumulation_steps:
            The mini-batches of one step, whose mean gradients are averaged. One by default.
        groups:
            Parameters that have a learning rate or a weight decay of their own. None by default.

    Raises:
        TypeError:
            If an argument is not of its type.
        ValueError:
            If an argument is out of its range, or ``nesterov`` comes with dampening.
    """

    momentum: float | None = None
    nesterov: bool = field(default=False, kw_only=True)
    dampening: float = field(default=0.0, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("nesterov", self.nesterov, bool)
        check_number("dampening", self.dampening)
        check_decay(self.weight_decay)
        if self.momentum is not None:
            check_number("momentum", self.momentum)
            if not 0.0 <= self.momentum < 1.0:
                raise ValueError(f"momentum must be in [0, 1) but got {self.momentum}.")
        if not 0.0 <= self.dampening < 1.0:
            raise ValueError(f"dampening must be in [0, 1) but got {self.dampening}.")
        if self.nesterov and self.dampening:
            raise ValueError(
                f"Nesterov momentum needs zero dampening, as in PyTorch, but got {self.dampening}."
            )

    @property
    def default_momentum(self) -> float | None:
        """The momentum of configurations without one; None if every trial must give one."""
        return self.momentum

    @property
    def acts_on_single_weights(self) -> bool:
        """True with groups: otherwise the kernel alone decides."""
        return self.groups is not None

    def configurations(
        self,
        learning_rate: ArrayLike,
        momentum: ArrayLike,
        schedule: Schedule | None = None,
    ) -> SGDConfigurations:
        """Return K configurations of this optimiser for a simulation.

        Args:
            learning_rate:
                One learning rate, or an array of shape ``(K,)``.
            momentum:
                One momentum, or an array of shape ``(K,)``.
            schedule:
                The schedule of the learning rate. Constant by default.

        Returns:
            The configurations.
        """
        return SGDConfigurations.of(
            learning_rate,
            momentum,
            dampening=self.dampening,
            nesterov=bool(self.nesterov),
            weight_decay=self.weight_decay,
            schedule=schedule,
            max_grad_norm=self.max_grad_norm,
            accumulation_steps=self.accumulation_steps,
            groups=self.groups,
        )
