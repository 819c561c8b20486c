"""The optimiser of a training script, read from PyTorch's object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

from optuna_ttp.dynamics._adam import Adam
from optuna_ttp.dynamics._adamw import AdamW
from optuna_ttp.dynamics._parameter_group import check_coverage
from optuna_ttp.dynamics._parameter_group import ParameterGroup
from optuna_ttp.dynamics._sgd import SGD


if TYPE_CHECKING:
    import torch


_REFUSED = ("amsgrad", "maximize", "differentiable")


def optimizer_from_torch(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    *,
    max_grad_norm: float | None = None,
    accumulation_steps: int = 1,
) -> SGD | Adam:
    """Return the optimiser of predictions for one of PyTorch, with its parameter groups.

    The learning rates of its groups become factors on the learning rate of a configuration, which
    is that of the first group. A learning rate that a scheduler has changed counts as it was
    before. ``foreach``, ``fused`` and ``capturable`` change nothing in the results and are
    ignored.

    Example:
        >>> adam = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.1)
        >>> optimizer_from_torch(adam, model).weight_decay
        0.1

    Args:
        optimizer:
            A :class:`torch.optim.SGD`, :class:`torch.optim.Adam` or :class:`torch.optim.AdamW`,
            which may be wrapped by accelerate or Lightning.
        model:
            The model that it trains. It may be left out if there is one group, or if the
            optimiser was made of ``model.named_parameters()``.
        max_grad_norm:
            The norm to which the training script shortens longer gradients. None by default.
        accumulation_steps:
            The mini-batches of one step of the optimiser. One by default.

    Returns:
        The optimiser.

    Raises:
        TypeError:
            If it is another optimiser.
        ValueError:
            If a setting is not supported, or if the groups do not hold all trainable parameters of
            the model.
    """
    import torch

    kinds: dict[type, type[SGD | Adam]] = {
        torch.optim.SGD: SGD,
        torch.optim.Adam: Adam,
        torch.optim.AdamW: AdamW,
    }
    wrapped = getattr(optimizer, "optimizer", None)
    if isinstance(wrapped, torch.optim.Optimizer):
        optimizer = wrapped
    kind = kinds.get(type(optimizer))
    if kind is None:
        raise TypeError(
            "optimizer must be a torch.optim.SGD, torch.optim.Adam or torch.optim.AdamW, which "
            f"can be simulated, but got {type(optimizer).__name__}."
        )
    first = optimizer.param_groups[0]
    shared = ("momentum", "nesterov", "dampening") if kind is SGD else ("betas", "eps")
    if kind is not SGD and first.get("decoupled_weight_decay"):
        kind = AdamW
    _check_settings(optimizer.param_groups, (*shared, "decoupled_weight_decay"))
    if kind is not SGD:
        _check_dense(model)
    settings: dict[str, Any] = {name: first[name] for name in shared}
    if kind is not SGD:
        settings["betas"] = tuple(float(beta) for beta in first["betas"])
    return kind(
        **settings,
        weight_decay=float(first["weight_decay"]),
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
        groups=_groups(optimizer, model),
    )


def _check_settings(groups: list[dict[str, Any]], shared: tuple[str, ...]) -> None:
    """Raise ValueError for a setting that is not simulated, or that differs between groups."""
    for group in groups:
        for name in _REFUSED:
            if group.get(name):
                raise ValueError(f"{name} must be False, since it is not simulated, but got True.")
        for name in shared:
            if group.get(name) != groups[0].get(name):
                raise ValueError(
                    f"All parameter groups must have the same {name} but got "
                    f"{groups[0].get(name)} and {group.get(name)}."
                )


def _check_dense(model: torch.nn.Module | None) -> None:
    """Raise ValueError if a layer of the model has sparse gradients, which Adam does not take."""
    for name, layer in () if model is None else model.named_modules():
        if getattr(layer, "sparse", False) is True:
            raise ValueError(
                f"Adam and AdamW need dense gradients but got sparse ones of {name!r}, a "
                f"{type(layer).__name__}. Give it sparse=False."
            )


def _groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module | None
) -> tuple[ParameterGroup, ...] | None:
    """Return the parameter groups by names, or None if all parameters are treated alike."""
    groups = optimizer.param_groups
    names = None
    if model is not None:
        trainable = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        names = [_names(group, trainable) for group in groups]
        every = tuple(ParameterGroup(n) for n in names)
        check_coverage(every, tuple(trainable.values()))
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    decays = [float(group["weight_decay"]) for group in groups]
    if len(set(rates)) == len(set(decays)) == 1:
        return None
    if names is None:
        if not all("param_names" in group for group in groups):
            raise ValueError(
                "Several parameter groups need the names of their parameters but got none. Give "
                "the model, too: optimizer_from_torch(optimizer, model)."
            )
        names = [
            tuple(
                name
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
                if parameter.requires_grad
            )
            for group in groups
        ]
    if not rates[0] > 0.0:
        raise ValueError(
            "The learning rate of the first parameter group, to which those of the others are "
            f"compared, must be positive but got {rates[0]}."
        )
    return tuple(
        ParameterGroup(n, rate / rates[0], decay)
        for n, rate, decay in zip(names, rates, decays, strict=True)
    )


def _names(group: Mapping[str, Any], trainable: Mapping[int, str]) -> tuple[str, ...]:
    """Return the names of a group's parameters; ValueError if the model lacks one of them."""
    named = []
    for parameter in group["params"]:
        if id(parameter) in trainable:
            named.append(trainable[id(parameter)])
        elif parameter.requires_grad:
            raise ValueError(
                "The optimiser's parameters must be those of the model but got one of shape "
                f"{tuple(parameter.shape)} that the model lacks."
            )
    return tuple(named)
