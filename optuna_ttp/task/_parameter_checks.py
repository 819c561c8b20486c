"""Checks of the model's parameters, and their learning-rate multipliers."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import SupportsFloat

import torch

from optuna_ttp.task._tensors import check_numbers


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside of (Distributed)DataParallel and torch.compile, or the model."""
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        model = model.module
    compiled_from = getattr(model, "_orig_mod", None)
    return compiled_from if isinstance(compiled_from, torch.nn.Module) else model


def check_parameters(model: torch.nn.Module) -> None:
    """Raise TypeError or ValueError if no weight is trainable, or one is complex or not finite."""
    _check_kinds(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "The model must have a trainable parameter but got "
            f"{len(list(model.parameters()))} parameters, none with requires_grad=True."
        )
    for name, module in model.named_modules():
        if getattr(module, "scale_grad_by_freq", False) and any(
            p.requires_grad for p in module.parameters(recurse=False)
        ):
            raise ValueError(
                f"The module {name!r} has scale_grad_by_freq=True: the gradient of a sample "
                "depends on the other samples of its batch, so that neither the empirical NTK "
                "nor a prediction is defined. Set it to False, or freeze the module with "
                "requires_grad_(False)."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"The model's weights must be finite but {name!r} is not.")
        if parameter.is_complex():
            raise TypeError(f"Complex parameters are not supported but {name!r} is complex.")


def _check_kinds(model: torch.nn.Module) -> None:
    """Raise TypeError or ValueError for TorchScript, lazy, meta and inference-mode weights."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(
            "TorchScript modules are not supported, because their weights cannot be exchanged. "
            "Pass the module that was scripted or traced."
        )
    parameters = list(model.named_parameters())
    lazy = [n for n, p in parameters if isinstance(p, torch.nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"The model has uninitialised lazy parameters ({', '.join(lazy[:3])}). "
            "Run one batch through it first."
        )
    for name, tensor in (*parameters, *model.named_buffers()):
        check_numbers(f"The model's weights and buffers ({name!r})", tensor)
        if tensor.is_inference():
            raise ValueError(
                f"The model's weights must take gradients, but {name!r} was made under "
                "torch.inference_mode(). Make the model outside of it, or load its state_dict "
                "into one that was."
            )


def rate_multipliers(model: torch.nn.Module, given: Mapping[str, float]) -> dict[str, float]:
    """Return the learning-rate multiplier of each trainable parameter, by its name.

    ``given`` maps beginnings of names to factors; the longest fitting one counts, without one the
    multiplier is 1. Raises TypeError or ValueError if a factor is not positive or fits no name.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(given, Mapping):
        raise TypeError(
            "learning_rate_multipliers must be a mapping from names to numbers but got "
            f"{type(given).__name__}."
        )
    for start, factor in given.items():
        if isinstance(factor, bool | str) or not isinstance(factor, SupportsFloat):
            raise TypeError(
                f"learning_rate_multipliers must be numbers but got {factor!r} for {start!r}."
            )
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(
                f"learning_rate_multipliers must be positive but got {factor} for {start!r}. "
                "Use requires_grad_(False) for weights that are not trained."
            )
        if not any(name.startswith(start) for name in names):
            raise ValueError(
                "learning_rate_multipliers must be given for the beginning of a trainable "
                f"parameter's name but got {start!r}. Names are like {', '.join(names[:3])}."
            )
    multipliers = {}
    for name in names:
        fitting = [start for start in given if name.startswith(start)]
        multipliers[name] = float(given[max(fitting, key=len)]) if fitting else 1.0
    return multipliers
