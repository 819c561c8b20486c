"""The registry of rules: which rule computes the gradients of which kind of layer."""

from __future__ import annotations

from typing import Any

import torch

from optuna_ttp.ntk.layers._batch_norm import batch_norm
from optuna_ttp.ntk.layers._channel_norm import group_norm
from optuna_ttp.ntk.layers._channel_norm import instance_norm
from optuna_ttp.ntk.layers._convolution import convolution
from optuna_ttp.ntk.layers._embedding import embedding
from optuna_ttp.ntk.layers._linear import linear
from optuna_ttp.ntk.layers._prepared_convolution import prepared_convolution
from optuna_ttp.ntk.layers._rule import Rule
from optuna_ttp.ntk.layers._token_norm import layer_norm
from optuna_ttp.ntk.layers._token_norm import rms_norm
from optuna_ttp.ntk.layers._transformers_conv1d import is_transformers_conv1d
from optuna_ttp.ntk.layers._transformers_conv1d import transformers_conv1d
from optuna_ttp.ntk.layers._transposed_convolution import transposed_convolution


_RULES: list[tuple[type[Any], Rule]] = [
    (torch.nn.Linear, linear),
    (torch.nn.Conv1d, convolution),
    (torch.nn.Conv2d, convolution),
    (torch.nn.Conv3d, convolution),
    (torch.nn.ConvTranspose1d, transposed_convolution),
    (torch.nn.ConvTranspose2d, transposed_convolution),
    (torch.nn.ConvTranspose3d, transposed_convolution),
    (torch.nn.Embedding, embedding),
    (torch.nn.BatchNorm1d, batch_norm),
    (torch.nn.BatchNorm2d, batch_norm),
    (torch.nn.BatchNorm3d, batch_norm),
    (torch.nn.GroupNorm, group_norm),
    (torch.nn.InstanceNorm1d, instance_norm),
    (torch.nn.InstanceNorm2d, instance_norm),
    (torch.nn.InstanceNorm3d, instance_norm),
    (torch.nn.LayerNorm, layer_norm),
]
if hasattr(torch.nn, "RMSNorm"):
    _RULES.append((torch.nn.RMSNorm, rms_norm))


def rule_for(module: torch.nn.Module) -> Rule | None:
    """Return the rule of a module, or :obj:`None` if no rule applies to it.

    A subclass of a layer has the rule of its base if it has the base's ``forward`` and plain
    parameters; other subclasses of convolutions have the rule of prepared convolutions.
    """
    for kind, rule in _RULES:
        if isinstance(module, kind):
            if not _is_plain(module):
                return None
            if _computes_like(module, kind):
                return rule
            return prepared_convolution if rule is convolution else None
    return transformers_conv1d if is_transformers_conv1d(module) else None


def _computes_like(module: torch.nn.Module, kind: type[Any]) -> bool:
    """Return whether a module has the ``forward`` and the parameters of its base ``kind``."""
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(kind, name, None):
            return False
    return all(name in module._parameters for name in ("weight", "bias") if hasattr(kind, name))


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether the weight is used unchanged and no output depends on other samples."""
    if getattr(module, "parametrizations", None) is not None or "weight" not in module._parameters:
        return False
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None
    if isinstance(module, torch.nn.Embedding):
        # max_norm changes the weights before they are used, not the derivative in them.
        return not module.scale_grad_by_freq
    return True
