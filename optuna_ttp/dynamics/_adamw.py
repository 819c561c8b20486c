"""Adam, with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from typing import ClassVar

from optuna_ttp.dynamics._adam import Adam


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as :class:`torch.optim.AdamW` does it.

    See :class:`~optuna_ttp.Adam`, from which it differs in the weight decay: every step multiplies
    the weights by one minus the learning rate times the decay (Loshchilov and Hutter, "Decoupled
    weight decay regularization", ICLR 2019, algorithm 2).

    Example:
        >>> optimizer = AdamW(weight_decay=0.1, max_grad_norm=1.0)
        >>> predictor = TrainingTimePredictor(spectrum, target_fraction=0.2, optimizer=optimizer)

    Args:
        betas:
            ``beta_1`` and ``beta_2``, both in [0, 1). 0.9 and 0.999 by default.
        eps:
            The number, positive, that is added to the root of the mean square. 1e-8 by default.
        weight_decay:
            The decoupled weight decay. 0.01 by default, as in PyTorch.
        max_grad_norm:
            The norm to which longer gradients are shortened. No clipping by default.
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

    weight_decay: float = field(default=0.01, kw_only=True)
    decoupled: ClassVar[bool] = True
