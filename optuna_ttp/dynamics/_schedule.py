"""Learning rates that change during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any
from typing import Literal
import warnings

import numpy as np
from numpy.typing import NDArray


Every = Literal["step", "epoch"]


@dataclass(frozen=True)
class Schedule:
    """A schedule of the learning rate, and possibly of the momentum, over the steps of training.

    Made by one of the class methods. A schedule either multiplies the configuration's learning
    rate by a number at each step, or it follows a scheduler of :mod:`torch.optim.lr_scheduler`.

    Example:
        >>> schedule = Schedule.cosine(total_steps=1000, warmup_steps=50)
        >>> predictor = TrainingTimePredictor(spectrum, target_fraction=0.2, schedule=schedule)

    Attributes:
        function:
            Maps the number of steps (or epochs) done to the multiplier, or is :obj:`None`.
        factory:
            Maps a :class:`torch.optim.Optimizer` to its scheduler, or is :obj:`None`.
        every:
            ``"step"`` if the schedule advances with every step, ``"epoch"`` if it does so at the
            end of every pass over the data.
        by_length:
            Maps the length of training in steps to such a function, if the schedule depends on
            the length, or is :obj:`None`.
        n_epochs:
            The length in passes over the data, from which the length in steps follows for each
            configuration by its batch size, or :obj:`None`.
    """

    function: Callable[[int], float] | None = None
    factory: Callable[[Any], Any] | None = None
    every: Every = "step"
    by_length: Callable[[int], Callable[[int], float]] | None = None
    n_epochs: float | None = None

    def __post_init__(self) -> None:
        if self.every not in ("step", "epoch"):
            raise ValueError(f'every must be "step" or "epoch" but got {self.every!r}.')
        parts = self.function, self.factory, self.by_length
        if sum(part is not None for part in parts) > 1:
            raise ValueError("A schedule has a function or a factory but got both.")
        if (self.by_length is None) != (self.n_epochs is None):
            raise ValueError("by_length and n_epochs belong together but got only one of them.")
        for part in parts:
            if part is not None and not callable(part):
                raise TypeError(f"A schedule must be callable but got {part!r}.")

    @classmethod
    def of(cls, schedule: Schedule | Callable[[int], float] | None) -> Schedule:
        """Return the schedule that a user gives as an object, a function or nothing.

        Args:
            schedule:
                A schedule, a function from the number of steps done to the multiplier of the
                learning rate, or :obj:`None` for a constant one.

        Returns:
            The schedule.

        Raises:
            TypeError:
                If it is none of these.
        """
        if isinstance(schedule, Schedule):
            return schedule
        if schedule is not None and not callable(schedule):
            raise TypeError(
                "schedule must be a Schedule or a function from steps to a multiplier but got "
                f"{schedule!r}. Wrap a torch scheduler: Schedule.from_torch(lambda sgd: ...)."
            )
        return cls(function=schedule)

    @classmethod
    def step(cls, step_size: int, gamma: float = 0.1, *, every: Every = "step") -> Schedule:
        """Multiply the learning rate by ``gamma`` after every ``step_size`` steps or epochs.

        Args:
            step_size:
                The steps or epochs after which the learning rate is multiplied. Positive.
            gamma:
                The factor. Positive. One tenth by default.
            every:
                The unit of ``step_size``. Steps by default.

        Returns:
            The schedule of :class:`torch.optim.lr_scheduler.StepLR`.

        Raises:
            ValueError:
                If an argument is out of its range.
        """
        _check_count("step_size", step_size)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma must be positive but got {gamma}.")
        return cls(lambda t: gamma ** (t // step_size), every=every)

    @classmethod
    def warmup(
        cls, warmup_steps: int, *, then: Schedule | None = None, every: Every = "step"
    ) -> Schedule:
        """Raise the learning rate linearly to its full value.

        Args:
            warmup_steps:
                The length of the warm-up. Its step ``t``, from 0 on, has the share
                ``(t + 1) / (warmup_steps + 1)`` of the learning rate.
            then:
                A multiplying schedule that starts where the warm-up ends. Constant by default.
            every:
                The unit of ``warmup_steps``. Steps by default.

        Returns:
            The schedule.

        Raises:
            ValueError:
                If ``warmup_steps`` is not positive, or ``then`` is a torch schedule or has
                another unit.
        """
        _check_count("warmup_steps", warmup_steps)
        after = Schedule() if then is None else then
        if after.factory is not None or (after.every != every and then is not None):
            raise ValueError("then must be a multiplying schedule in the same unit.")

        def function(t: int) -> float:
            if t < warmup_steps:
                return (t + 1) / (warmup_steps + 1)
            return 1.0 if after.function is None else after.function(t - warmup_steps)

        return cls(function, every=every)

    @classmethod
    def cosine(
        cls, total_steps: int, *, final: float = 0.0, warmup_steps: int = 0, every: Every = "step"
    ) -> Schedule:
        """Lower the learning rate along half a cosine, after a linear warm-up if one is wanted.

        Args:
            total_steps:
                The length, warm-up included. The rate keeps its final value afterwards.
            final:
                The share of the learning rate at the end. Zero by default.
            warmup_steps:
                The length of the warm-up. Zero by default.
            every:
                The unit of both lengths. Steps by default.

        Returns:
            The schedule of :class:`torch.optim.lr_scheduler.CosineAnnealingLR`.

        Raises:
            ValueError:
                If an argument is out of its range.
        """
        _check_count("total_steps", total_steps)
        if not 0.0 <= final <= 1.0:
            raise ValueError(f"final must be in [0, 1] but got {final}.")
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"warmup_steps must be from 0 to below total_steps but got {warmup_steps}."
            )
        length = total_steps - warmup_steps

        def function(t: int) -> float:
            share = min(t, length) / length
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))

        decay = cls(function, every=every)
        return decay if warmup_steps == 0 else cls.warmup(warmup_steps, then=decay, every=every)

    @classmethod
    def linear(
        cls,
        total_steps: int | None = None,
        *,
        n_epochs: float | None = None,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
    ) -> Schedule:
        """Raise the learning rate linearly during a warm-up, if any, and lower it to zero.

        This is the default of ``transformers.Trainer``; see :meth:`trainer` for the arguments.

        Example:
            >>> schedule = Schedule.linear(n_epochs=3, warmup_ratio=0.1)

        Args:
            total_steps:
                The length in steps, warm-up included.
            n_epochs:
                The length in passes over the data, instead of ``total_steps``.
            warmup_steps:
                The length of the warm-up. Zero by default.
            warmup_ratio:
                The length of the warm-up as a share of the whole, if ``warmup_steps`` is zero.

        Returns:
            The schedule.
        """
        return cls.trainer(
            "linear",
            total_steps,
            n_epochs=n_epochs,
            warmup_steps=warmup_steps,
            warmup_ratio=warmup_ratio,
        )

    @classmethod
    def trainer(
        cls,
        kind: Literal["linear", "cosine", "constant_with_warmup"],
        total_steps: int | None = None,
        *,
        n_epochs: float | None = None,
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
    ) -> Schedule:
        """Return a schedule of ``transformers.Trainer``, by its ``lr_scheduler_type``.

        The warm-up rises from zero: step ``t``, from 0 on, has the share ``t / warmup_steps``. The
        length follows from the epochs for every batch size, as the trainer computes it.

        Args:
            kind:
                ``"linear"`` falls to zero at the end, ``"cosine"`` does so along half a cosine,
                and ``"constant_with_warmup"`` stays.
            total_steps:
                The length in steps, warm-up included. The rate keeps its last value afterwards.
            n_epochs:
                The length in passes over the data, instead of ``total_steps``.
            warmup_steps:
                The length of the warm-up. Zero by default.
            warmup_ratio:
                The length of the warm-up as a share of the whole, if ``warmup_steps`` is zero.
                Zero by default.

        Returns:
            The schedule.

        Raises:
            ValueError:
                If an argument is out of its range, or not exactly one length is given.
        """
        if kind not in _SHAPES:
            raise ValueError(f"kind must be one of {', '.join(_SHAPES)} but got {kind!r}.")
        if (total_steps is None) == (n_epochs is None):
            raise ValueError(
                "Exactly one of total_steps and n_epochs must be given but got "
                f"{total_steps} and {n_epochs}."
            )
        if total_steps is not None:
            _check_count("total_steps", total_steps)
        elif not (n_epochs is not None and math.isfinite(n_epochs) and n_epochs > 0):
            raise ValueError(f"n_epochs must be positive but got {n_epochs}.")
        if not 0.0 <= warmup_ratio <= 1.0:
            raise ValueError(f"warmup_ratio must be in [0, 1] but got {warmup_ratio}.")
        if warmup_steps:
            _check_count("warmup_steps", warmup_steps)

        def by_length(length: int) -> Callable[[int], float]:
            warm = warmup_steps or math.ceil(warmup_ratio * length)

            def function(t: int) -> float:
                if t < warm:
                    return t / warm
                return _SHAPES[kind](min(1.0, (t - warm) / max(1, length - warm)))

            return function

        if total_steps is not None:
            return cls(by_length(total_steps))
        return cls(by_length=by_length, n_epochs=n_epochs)

    @classmethod
    def one_cycle(cls, total_steps: int, **settings: Any) -> Schedule:
        """Raise the learning rate up to the configuration's and lower it again, in one cycle.

        Args:
            total_steps:
                Steps of the cycle. Training that goes on keeps the last learning rate.
            settings:
                Other arguments of :class:`torch.optim.lr_scheduler.OneCycleLR`. Its momentum
                cycles in the opposite direction, between 0.85 and 0.95 whatever the
                configuration's momentum is, unless ``cycle_momentum=False`` is given.

        Returns:
            The schedule.
        """
        _check_count("total_steps", total_steps)

        def factory(optimizer: Any) -> Any:
            from torch.optim.lr_scheduler import OneCycleLR

            return OneCycleLR(
                optimizer, optimizer.param_groups[0]["lr"], total_steps=total_steps, **settings
            )

        return cls(factory=factory)

    @classmethod
    def from_torch(cls, factory: Callable[[Any], Any], *, every: Every = "step") -> Schedule:
        """Return a schedule that follows a scheduler of PyTorch.

        Example:
            >>> from torch.optim.lr_scheduler import ExponentialLR
            >>> schedule = Schedule.from_torch(lambda sgd: ExponentialLR(sgd, 0.99), every="epoch")

        Args:
            factory:
                Maps an optimiser to its scheduler. It is called with an optimiser of one weight
                that has the configuration's learning rate and momentum.
            every:
                When the training loop calls ``scheduler.step()``. After every step by default.

        Returns:
            The schedule.
        """
        if not callable(factory):
            raise TypeError(f"A schedule must be callable but got {factory!r}.")
        return cls(factory=factory, every=every)

    @property
    def is_constant(self) -> bool:
        """True if the learning rate and the momentum stay constant."""
        return self.function is None and self.factory is None and self.by_length is None

    def values(
        self,
        learning_rate: NDArray[np.float64],
        momentum: NDArray[np.float64],
        steps_per_epoch: int,
        n_steps: int,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return learning rate and momentum of every step of K configurations.

        Args:
            learning_rate:
                The configurations' learning rates, shape ``(K,)``.
            momentum:
                The configurations' momenta, shape ``(K,)``.
            steps_per_epoch:
                Optimiser steps per pass over the data.
            n_steps:
                The number of steps T.

        Returns:
            Learning rates and momenta, both of shape ``(K, T)``.

        Raises:
            ValueError:
                If the schedule gives a learning rate that is negative or not finite, or a momentum
                outside [0, 1).
        """
        n_changes = n_steps if self.every == "step" else -(-n_steps // steps_per_epoch)
        if self.factory is None:
            function = self._multiplier_of(steps_per_epoch)
            multiplier = np.array([_multiplier(function, t) for t in range(n_changes)])
            rates = learning_rate[:, None] * multiplier
            momenta = np.repeat(momentum[:, None], n_changes, axis=1)
        else:
            pairs = [
                _scheduled(self.factory, r, m, n_changes)
                for r, m in zip(learning_rate, momentum, strict=True)
            ]
            rates = np.array([rate for rate, _ in pairs])
            momenta = np.array([m for _, m in pairs])
        _check_values(rates, (rates >= 0) & np.isfinite(rates), "learning rate", "not negative")
        _check_values(momenta, (momenta >= 0) & (momenta < 1), "momentum", "in [0, 1)")
        if self.every == "epoch":
            rates, momenta = (
                np.repeat(a, steps_per_epoch, axis=1)[:, :n_steps] for a in (rates, momenta)
            )
        return rates, momenta

    def _multiplier_of(self, steps_per_epoch: int) -> Callable[[int], float]:
        """Return the function from steps to multipliers, if an epoch has so many steps."""
        if self.by_length is not None and self.n_epochs is not None:
            return self.by_length(math.ceil(self.n_epochs * steps_per_epoch))
        return (lambda t: 1.0) if self.function is None else self.function


# The share of the learning rate by the share of the way from the warm-up's end to the end.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant_with_warmup": lambda share: 1.0,
}


def _multiplier(function: Callable[[int], float], t: int) -> float:
    """Return the multiplier ``function(t)``; infinity if it overflows."""
    try:
        return float(function(t))
    except OverflowError:
        return math.inf


def _scheduled(
    factory: Callable[[Any], Any], rate: float, momentum: float, n_changes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return learning rates and momenta ``(n_changes,)`` that a torch scheduler sets in turn.

    It runs on an optimiser of one weight that starts with ``rate`` and ``momentum``. ValueError
    if the factory returns no scheduler, or one that needs a metric.
    """
    import torch

    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum)
    scheduler = factory(optimizer)
    if not hasattr(scheduler, "step") or isinstance(
        scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
    ):
        raise ValueError(
            "The factory of a schedule must give a torch scheduler that needs no metric but got "
            f"{type(scheduler).__name__}."
        )
    group = optimizer.param_groups[0]
    values = np.empty((2, n_changes))
    # After its last step OneCycleLR would overshoot once and then raise an error.
    last = n_changes
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR):
        last = scheduler.total_steps - 1
    with warnings.catch_warnings():
        # The optimiser never takes a step.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for t in range(n_changes):
            values[:, t] = float(group["lr"]), float(group["momentum"])
            if t < last:
                scheduler.step()
    return values[0], values[1]


def _check_count(name: str, value: int) -> None:
    """Raise ValueError if value is not a positive integer."""
    if isinstance(value, bool) or not 1 <= value < math.inf or value != int(value):
        raise ValueError(f"{name} must be a positive integer but got {value!r}.")


def _check_values(
    values: NDArray[np.float64], good: NDArray[np.bool_], what: str, demand: str
) -> None:
    """Raise ValueError with the first step, along the last axis, with a value not ``good``."""
    if not good.all():
        step = int(np.argmin(good.all(axis=0)))
        raise ValueError(
            f"The {what} of a schedule must be {demand} but got {values[:, step].min():g} at "
            f"step {step}."
        )
