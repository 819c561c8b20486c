"""One training run with AdamW: its configuration and the rate of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Run:
    """The configuration of one run; together with the task it determines the run.

    Attributes:
        learning_rate:
            The peak of the schedule.
        batch_size:
            B. The last batch of an epoch is smaller where B does not divide N.
        beta_1:
            Of the mean of the gradients.
        beta_2:
            Of the mean of their squares.
        weight_decay:
            Decoupled, on every weight that is trained.
        eps:
            Is added to the square root.
        schedule:
            "constant", or "linear": up over the warm-up, then down to zero (see :meth:`rate`).
        schedule_steps:
            Where a linear schedule ends. Zero for a constant one.
        warmup_steps:
            Of a linear schedule.
        max_grad_norm:
            Gradients are clipped to this norm; None where they are not.
        seed:
            Of the order of the samples.
        max_steps:
            Where the run ends at the latest.
    """

    learning_rate: float
    batch_size: int
    beta_1: float
    beta_2: float
    weight_decay: float
    eps: float
    schedule: Literal["constant", "linear"]
    schedule_steps: int
    warmup_steps: int
    max_grad_norm: float | None
    seed: int
    max_steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step.

        The formula of ``get_linear_schedule_with_warmup`` in Hugging Face's transformers: with T
        steps of the schedule, W of them the warm-up, ``rate * s / W`` at step ``s < W`` and
        ``rate * (T - s) / (T - W)`` from there on. So the first step of a warm-up has rate zero.

        Args:
            step:
                Counted from zero.

        Returns:
            The rate.
        """
        if self.schedule == "constant":
            return self.learning_rate
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        left = max(0, self.schedule_steps - step)
        return self.learning_rate * left / max(1, self.schedule_steps - self.warmup_steps)


@dataclass(frozen=True)
class LoraRun(Run):
    """The configuration of one run with adapters.

    Attributes:
        rank:
            Of the adapters.
        alpha:
            The adapters' product is multiplied by alpha over the rank.
        rank_stabilised:
            Whether it is multiplied by alpha over the square root of the rank instead.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
