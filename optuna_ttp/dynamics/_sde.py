"""The paper's equation, gradient flow with or without noise, as a baseline."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._plan import effective_rates
from optuna_ttp.dynamics._plan import RULES
from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
from optuna_ttp.dynamics._target import Target
from optuna_ttp.dynamics._trajectories import Record
from optuna_ttp.dynamics._trajectories import Trajectories


# Largest relative change of the steepest direction in one step of the integrator.
_CHANGE = {"ode": 1.0, "sde": 0.5}


def simulate_equation(
    model: LinearisedModel,
    sgd: SGDConfigurations,
    batch_size: Integers,
    *,
    max_steps: Integers,
    method: Literal["ode", "sde"],
    target: Target | None = None,
    full_curves: bool = False,
    seed: int = 0,
    steps_per_epoch: Integers | None = None,
) -> Trajectories:
    """Integrate equation 1 of Zancato et al., NeurIPS 2020, for K configurations.

    ``df = -eta_e Theta grad_f L dt + (eta_e / sqrt(B)) J Sigma^(1/2) dn`` with the effective
    learning rate ``eta_e = eta / (1 - m)``, in the coordinates ``theta`` of the spectrum's
    eigen-directions. ``Sigma`` is diagonal there, estimated once at the start and then rescaled by
    ``|grad_f L_t|^2 / |grad_f L_0|^2`` (its section 4). One optimiser step is one unit of time.
    Without noise (``"ode"``, and full batches) the fourth-order Runge-Kutta method, with noise
    (``"sde"``) Euler-Maruyama; each optimiser step is divided until the steepest direction changes
    by at most 1, respectively 0.5, in a step of the integrator.

    Arguments are those of :func:`simulate`; Nesterov's variant is the same as heavy ball here, and
    weight decay, which the equation does not know, raises a :class:`ValueError`. Training loss and
    accuracy are recorded at every step.
    """
    if sgd.weight_decay.any():
        raise ValueError(
            "The paper's equation has no weight decay: weight_decay must be zero with method="
            f'"{method}" but got {sgd.weight_decay.max():g}. Use method="linear".'
        )
    n_configurations = len(sgd)
    curvature = float(model.curvatures[0])
    n_steps = int(max_steps.max(initial=1))
    effective = np.empty((n_configurations, n_steps))
    if steps_per_epoch is None:
        steps_per_epoch = -(-model.n_samples // batch_size)
    for per_epoch in np.unique(steps_per_epoch):
        alike = np.flatnonzero(steps_per_epoch == per_epoch)
        effective[alike] = effective_rates(sgd[alike], int(per_epoch), n_steps)
    noisy = (batch_size < model.n_samples) & (method == "sde")
    change = _CHANGE[method]
    parts = np.maximum(1, np.ceil(effective.max(axis=1) * curvature / change)).astype(np.int64)
    parts = 2 ** np.ceil(np.log2(parts)).astype(np.int64)
    records: list[Record] = [[] for _ in range(n_configurations)]
    generator = torch.Generator().manual_seed(seed)
    for n_parts, with_noise in sorted(set(zip(parts, noisy, strict=True))):
        members = np.flatnonzero((parts == n_parts) & (noisy == with_noise))
        _integrate(
            model,
            torch.as_tensor(effective[members]).to(model.features),
            torch.as_tensor(batch_size[members]).to(model.features) if with_noise else None,
            max_steps[members],
            int(n_parts),
            None if full_curves else target,
            [records[k] for k in members],
            generator,
        )
    blown_up = np.array([not r[-1][1] <= RULES.blow_up * r[0][1] for r in records], dtype=bool)
    one = np.ones(n_configurations, dtype=np.int64)
    curves = Trajectories.of_records(records, ["loss", "accuracy"], blown_up, one)
    if model.labels is None:
        del curves.curves["accuracy"]
    return curves


def _integrate(
    model: LinearisedModel,
    effective: torch.Tensor,
    batch_size: torch.Tensor | None,
    max_steps: Integers,
    n_parts: int,
    target: Target | None,
    records: list[Record],
    generator: torch.Generator,
) -> None:
    """Integrate K configurations with ``n_parts`` integrator steps per step; append to records.

    ``effective`` has the effective learning rates ``(K, T)``; ``batch_size``, ``(K,)``, is None
    for training without noise. A row of a record is (step, training loss, accuracy or NaN). A
    configuration ends at its ``max_steps``, at the target, or when its loss blows up.
    """
    theta = model.features.new_zeros((len(records), model.rank))
    active = np.arange(len(records))
    initial = float(model.loss(model.initial_outputs[None]))
    start = _residual_norms(model, theta)
    for step in range(int(max_steps.max()) + 1):
        outputs = model.outputs(theta)
        losses = model.loss(outputs).double().cpu().numpy()
        shares = np.full(len(losses), np.nan)
        if model.labels is not None:
            shares = model.accuracy(outputs).cpu().numpy()
        for k, loss, share in zip(active, losses, shares, strict=True):
            records[k].append((float(step), float(loss), float(share)))
        done = (step >= max_steps[active]) | ~(losses <= RULES.blow_up * initial)
        if target is not None:
            done |= target.reached(losses if target.is_loss else shares)
        if done.all():
            return
        keep = torch.as_tensor(~done, device=theta.device)
        theta, effective, start = theta[keep], effective[keep], start[keep]
        batch_size = None if batch_size is None else batch_size[keep]
        active = active[~done]
        rate = effective[:, step, None] / n_parts
        for _ in range(n_parts):
            if batch_size is None:
                theta = _runge_kutta(model, theta, rate)
                continue
            scale = _residual_norms(model, theta) / start
            # A CPU generator, so that every device draws the same noise.
            noise = torch.randn(theta.shape, generator=generator).to(theta)
            width = rate * (n_parts / batch_size).sqrt()[:, None] * scale[:, None]
            drift = rate * model.gradient(theta)
            theta = theta - drift + width * model.gradient_variances.sqrt() * noise


def _runge_kutta(model: LinearisedModel, theta: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Return states ``(K, r)`` after a fourth-order Runge-Kutta step of length ``rate``."""
    first = model.gradient(theta)
    second = model.gradient(theta - 0.5 * rate * first)
    third = model.gradient(theta - 0.5 * rate * second)
    fourth = model.gradient(theta - rate * third)
    return theta - rate / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)


def _residual_norms(model: LinearisedModel, theta: torch.Tensor) -> torch.Tensor:
    """Return ``|grad_f L|`` of K states ``(K, r)``, of shape ``(K,)``."""
    residuals = model.residuals(model.outputs(theta), model.soft_targets, model.normalisers)
    return residuals.square().sum(dim=(1, 2)).sqrt()
