"""Adam, with L2 weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math
from typing import ClassVar
from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_number
from optuna_ttp.dynamics._adam_configurations import AdamConfigurations
from optuna_ttp.dynamics._optimizer import check_decay
from optuna_ttp.dynamics._optimizer import Optimizer


if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from optuna_ttp.dynamics._schedule import Schedule


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam as :class:`torch.optim.Adam` does it, without ``amsgrad``.

    It holds the settings that all trials of a search share. The learning rate and the batch size
    are given with each configuration. The momentum of a configuration is its ``beta_1``.
    Predictions need a spectrum that holds a sample of the Jacobian's columns.

    Example:
        >>> predictor = TrainingTimePredictor(spectrum, target_fraction=0.2, optimizer=Adam())

    Args:
        betas:
            ``beta_1``, the momentum of configurations that do not give one themselves, and
            ``beta_2``, the weight of the past in the mean square of the gradients, both in
            [0, 1). 0.9 and 0.999 by default.
        eps:
            The number, positive, that is added to the root of the mean square. 1e-8 by default.
        weight_decay:
            The L2 weight decay, which is added to the gradient. Zero by default.
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
            If an argument is out of its range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = field(default=1e-8, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)
    decoupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("betas", self.betas, tuple)
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers but got {self.betas!r}.")
        for place, beta in enumerate(self.betas):
            check_number(f"betas[{place}]", beta)
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{place}] must be in [0, 1) but got {beta}.")
        check_number("eps", self.eps)
        if not (math.isfinite(self.eps) and self.eps > 0.0):
            raise ValueError(f"eps must be positive but got {self.eps}.")
        check_decay(self.weight_decay)

    @property
    def default_momentum(self) -> float | None:
        """``beta_1`` of configurations that do not give one."""
        return float(self.betas[0])

    @property
    def acts_on_single_weights(self) -> bool:
        """True: every weight has a step length of its own."""
        return True

    def configurations(
        self,
        learning_rate: ArrayLike,
        momentum: ArrayLike,
        schedule: Schedule | None = None,
    ) -> AdamConfigurations:
        """Return K configurations of this optimiser for a simulation.

        Args:
            learning_rate:
                One learning rate, or an array of shape ``(K,)``.
            momentum:
                ``beta_1``: one number, or an array of shape ``(K,)``.
            schedule:
                The schedule of the learning rate. Constant by default.

        Returns:
            The configurations.
        """
        return AdamConfigurations.of(
            learning_rate,
            momentum,
            beta_2=float(self.betas[1]),
            eps=float(self.eps),
            weight_decay=float(self.weight_decay),
            decoupled=self.decoupled,
            schedule=schedule,
            max_grad_norm=self.max_grad_norm,
            accumulation_steps=self.accumulation_steps,
            groups=self.groups,
        )
