"""A short training run: a few real steps of one configuration, as an observation."""

from __future__ import annotations

from dataclasses import replace
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.checks import check_number
from optuna_ttp.calibration import FRACTIONS
from optuna_ttp.calibration import LossCurve
from optuna_ttp.calibration import Observation
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import Target
from optuna_ttp.ntk import resolve_device
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._estimator import Estimator
from optuna_ttp.prediction._rules import RULES


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


# The number of samples that go through the network together.
_CHUNK = 64


def _chosen(
    estimator: Estimator, steps: int, learning_rate: float | None, momentum: float | None
) -> tuple[float, float]:
    """Return the stable learning rate and momentum with the lowest predicted loss after ``steps``.

    A given learning rate or momentum is used as it is; with a given learning rate, momentum is
    zero by default.
    """
    if learning_rate is not None:
        return float(learning_rate), 0.0 if momentum is None else float(momentum)
    wanted = (0.0, 0.9) if momentum is None else (float(momentum),)
    shares = np.tile(RULES.short_run_shares, len(wanted))
    momenta = np.repeat(wanted, len(RULES.short_run_shares))
    simulator = estimator.simulator
    batch_sizes = np.full(len(shares), simulator.n_samples)
    rates = shares * simulator.max_learning_rate(batch_sizes, momenta)
    candidates = Configurations.of(rates, batch_sizes, momenta, steps, simulator.n_samples)
    prediction = estimator.predict(candidates, full_curve=True)
    losses = np.array(
        [
            np.interp(steps, s[np.isfinite(s)], c[np.isfinite(s)])
            for s, c in zip(prediction.curve_steps, prediction.curve_losses, strict=True)
        ]
    )
    # A simulated loss may be zero if the simulated outputs grow without bound.
    depths = np.log(simulator.initial_loss / np.maximum(losses, 1e-30))[:, None]
    instability = simulator.instability(depths, shares)[:, 0]
    # The smallest learning rates are always stable.
    stable = instability <= RULES.short_run_instability
    best = int(np.argmin(np.where(stable, losses, np.inf)))
    return float(rates[best]), float(momenta[best])


def observe_short_run(
    estimator: Estimator,
    task: FineTuningTask,
    steps: int,
    learning_rate: float | None,
    momentum: float | None,
    device: str | None,
) -> tuple[Observation, float, str]:
    """Train a few full-batch steps with the given, or else a chosen, learning rate and momentum.

    Return the observation, the seconds of the training, and a text that says why nothing can be
    learned from it, or an empty text. ValueError or TypeError if an argument is invalid.
    """
    optimizer = estimator.simulator.optimizer
    if not isinstance(optimizer, SGD) or optimizer.groups is not None:
        raise ValueError(
            "A short training run trains by SGD without parameter groups, of which an optimiser "
            f"that acts on single weights learns nothing, but got {optimizer}."
        )
    given = {"learning_rate": learning_rate, "momentum": momentum}
    for name, value in given.items():
        if value is not None:
            check_number(name, value)
    n_samples = estimator.simulator.n_samples
    Configurations.of(
        1.0 if learning_rate is None else learning_rate, 1, momentum or 0.0, steps, n_samples
    )
    rate, momentum = _chosen(estimator, steps, learning_rate, momentum)
    started = time.perf_counter()
    losses = _train(
        task,
        estimator.simulator.model,
        learning_rate=rate,
        momentum=momentum,
        steps=steps,
        device=resolve_device(task, device),
    )
    seconds = time.perf_counter() - started
    observation = _observation(estimator, losses, steps, rate, momentum)
    if np.isfinite(observation.observed).any():
        return observation, seconds, ""
    what = "rose without bound" if observation.diverged else "fell by less than 5 %"
    do = "a smaller" if observation.diverged else f"more than {steps} steps, or a larger"
    problem = (
        f"Nothing is learned from the short training run: its loss {what}, with a learning rate "
        f"of {rate:.3g} and a momentum of {momentum:.3g}. Take {do} learning rate."
    )
    return observation, seconds, problem


def _observation(
    estimator: Estimator, losses: Floats, steps: int, learning_rate: float, momentum: float
) -> Observation:
    """Return the observation, with its prediction, of a run with losses ``(steps + 1,)``."""
    simulator = estimator.simulator
    # The run counts at all levels that it passed, also at those below the target.
    target = Target("loss", min(np.nanmin(losses), 0.99 * simulator.initial_loss))
    deep = replace(estimator, simulator=replace(simulator, target=target))
    whole = Configurations.of(
        learning_rate, simulator.spectrum.n_samples, momentum, 100 * steps, simulator.n_samples
    )
    prediction = deep.predict(whole, full_curve=False)
    curve = LossCurve.of(losses)
    observed, errors = curve.log_first_passage_times(simulator.initial_loss * FRACTIONS)
    return Observation(
        predicted=prediction.log_first_passage_times,
        expected=prediction.expected_log_first_passage_times,
        growth=prediction.log_growth,
        covariates=prediction.covariates,
        instability=prediction.instability,
        effective_learning_rate=learning_rate / (1.0 - momentum),
        lag=momentum / (1.0 - momentum),
        observed=observed,
        errors=errors,
        n_steps=steps,
        diverged=curve.diverged or len(losses) <= steps,
    )


def _train(
    task: FineTuningTask,
    model: LinearisedModel,
    *,
    learning_rate: float,
    momentum: float,
    steps: int,
    device: torch.device,
) -> Floats:
    """Train the network for a few steps of full-batch gradient descent, and restore its weights.

    Full batches are used because the losses of a few mini-batches would tell more about the
    batches than about the network. The linearised model gives the loss and its gradient with
    respect to the outputs; each parameter has the learning rate times its multiplier in the task.
    Return the training loss over all samples before each step and after the last step, of shape
    ``(steps + 1,)``; it is shorter if training blew up.
    """
    losses: list[float] = []
    with task.frozen(device, torch.float32) as frozen:
        weights = {k: p.detach().clone().requires_grad_() for k, p in frozen.parameters.items()}
        frozen.replace_parameters(weights)
        velocity = [torch.zeros_like(w) for w in weights.values()]
        for step in range(steps + 1):
            loss, gradient = _gradient(task, model, frozen, device, wanted=step < steps)
            losses.append(loss)
            if not loss <= RULES.most_rise * losses[0]:
                break
            with torch.no_grad():
                for w, v, g, c in zip(
                    weights.values(), velocity, gradient, task.multipliers.values(), strict=True
                ):
                    v.mul_(momentum).add_(g)
                    w.sub_(v, alpha=learning_rate * c)
    return np.array(losses)


def _gradient(
    task: FineTuningTask,
    model: LinearisedModel,
    frozen: FrozenModel,
    device: torch.device,
    *,
    wanted: bool,
) -> tuple[float, list[torch.Tensor]]:
    """Return the training loss over all samples and, if ``wanted``, its gradient, else zeros.

    The gradient is a list with one tensor per parameter, of the parameter's shape.
    """
    parameters = list(frozen.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    whole = float(model.normalisers.sum())
    loss = 0.0
    start = 0
    for inputs, _ in task.batches(_CHUNK, device, torch.float32):
        with torch.set_grad_enabled(wanted):
            outputs = frozen(inputs)
        rows = slice(start, start + len(outputs))
        start += len(outputs)
        soft, normalisers = (a[rows].to(outputs) for a in (model.soft_targets, model.normalisers))
        share = float(normalisers.sum()) / whole
        loss += share * float(model.batch_loss(outputs.detach()[None], soft, normalisers))
        if wanted:
            seeds = share * model.residuals(outputs.detach()[None], soft, normalisers)[0]
            parts = torch.autograd.grad(
                outputs, parameters, seeds, allow_unused=True, materialize_grads=True
            )
            for sum_, part in zip(total, parts, strict=True):
                sum_ += part if part.layout == torch.strided else part.to_dense()
    return loss, total
