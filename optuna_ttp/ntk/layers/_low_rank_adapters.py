"""Low-rank adapters (LoRA) of a network, recognised by the structure that peft gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LowRankAdapter:
    """An adapter ``s B A x`` of a layer, by the names of the layer and of the weights A and B."""

    module: str
    first: str
    second: str


def low_rank_adapters(model: torch.nn.Module) -> tuple[LowRankAdapter, ...]:
    """Return the adapters both of whose factors are trained.

    An adapted layer has ``lora_A`` and ``lora_B``, which map the names of adapters to linear
    layers without and with or without a bias, as ``lora.Linear`` of peft does for linear layers
    and for ``Conv1D`` of transformers; peft need not be installed. If one factor is fixed the
    outputs are linear in the other one, and its columns suffice. ValueError is raised, by name,
    for adapters whose change of the weight is not the product of A and B.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    adapters = []
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict):
            continue
        parts = [p for n, p in module.named_parameters() if n.startswith("lora_")]
        if not any(p.requires_grad for p in parts):
            continue
        reason = _obstacle(module)
        if reason is not None:
            raise ValueError(
                f"The low-rank adapter of {name!r} must be plain LoRA of a linear layer for the "
                f'engine "columns" but got {reason}. Use another engine, and SGD.'
            )
        active = _active(module)[0]
        first, second = (getattr(module, n)[active].weight for n in ("lora_A", "lora_B"))
        if first.requires_grad and second.requires_grad:
            adapters.append(LowRankAdapter(name, names[id(first)], names[id(second)]))
    weights = [n for a in adapters for n in (a.first, a.second)]
    for adapter in adapters:
        if weights.count(adapter.first) > 1 or weights.count(adapter.second) > 1:
            raise ValueError(
                "Every low-rank adapter must have weights that no other layer has but got shared "
                f'ones in {adapter.module!r}. Use another engine than "columns", and SGD.'
            )
    return tuple(adapters)


def _active(module: Any) -> list[str]:
    """Return the names of the adapters that are active in a layer."""
    names = getattr(module, "active_adapters", None)
    if names is None:
        names = list(module.lora_A)
    return [name for name in names if name in module.lora_A]


def _obstacle(module: Any) -> str | None:
    """Return what makes an adapted layer another function than ``W x + s B A x``, or None."""
    if len(getattr(module, "lora_embedding_A", ())):
        return "one of an embedding"
    if getattr(module, "merged", False):
        return "one that is merged into the weight (call unmerge_adapter)"
    if getattr(module, "disable_adapters", False):
        return "one that is disabled"
    active = _active(module)
    if len(active) != 1:
        return f"{len(active)} active adapters"
    name = active[0]
    variant = dict(getattr(module, "lora_variant", {})).get(name)
    if dict(getattr(module, "use_dora", {})).get(name) or name in getattr(
        module, "lora_magnitude_vector", ()
    ):
        return "one with use_dora (DoRA)"
    if variant is not None:
        return f"the variant {type(variant).__name__}"
    first, second = module.lora_A[name], module.lora_B[name]
    for part in (first, second):
        if type(part) is not torch.nn.Linear:
            return f"a factor that is a {type(part).__name__}"
    if first.bias is not None:
        return "a factor A with a bias"
    dropout = getattr(dict(getattr(module, "lora_dropout", {})).get(name), "p", 0.0)
    if module.training and dropout > 0.0:
        return f"one with lora_dropout={dropout} in training mode (set it to zero)"
    return None
