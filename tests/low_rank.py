"""Layers with low-rank adapters of the structure that peft gives them, and networks of them."""

from __future__ import annotations

import math

import torch

from optuna_ttp.task import FineTuningTask


class AdaptedLinear(torch.nn.Module):
    """A fixed linear layer with adapters, as ``peft.tuners.lora.Linear`` has them."""

    def __init__(
        self,
        layer: torch.nn.Linear,
        rank: int = 2,
        alpha: float = 4.0,
        *,
        rank_stabilised: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(requires_grad=False)
        wide, narrow = layer.in_features, layer.out_features
        scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        drop = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
        self.active_adapters = ["default"]
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(wide, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, narrow, bias=bias)})
        self.lora_dropout = torch.nn.ModuleDict({"default": drop})
        self.scaling = {"default": scale}
        self.use_dora = {"default": False}
        with torch.no_grad():
            for p in self.lora_B.parameters():
                p.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``W x + b + s B A x``."""
        outputs: torch.Tensor = self.base_layer(x)
        for name in self.active_adapters:
            hidden = self.lora_A[name](self.lora_dropout[name](x))
            outputs = outputs + self.lora_B[name](hidden) * self.scaling[name]
        return outputs

    def start(self) -> None:
        """Make B random instead of zero."""
        with torch.no_grad():
            for p in self.lora_B.parameters():
                p.normal_()


class MeanOfTokens(torch.nn.Module):
    """A fixed readout, with a trained bias, of the mean over tokens of a layer's outputs.

    With an adapted layer it is linear in the weight of that layer.
    """

    def __init__(self, layer: torch.nn.Module, width: int, n_outputs: int = 3) -> None:
        super().__init__()
        self.layer = layer
        self.readout = torch.nn.Linear(width, n_outputs)
        self.readout.weight.requires_grad = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return outputs for tokens of shape ``(B, S, k)``."""
        outputs: torch.Tensor = self.readout(self.layer(tokens).mean(dim=1))
        return outputs


def adapted_task(
    rank: int = 2,
    alpha: float = 4.0,
    *,
    rank_stabilised: bool = False,
    bias: bool = False,
    started: bool = False,
    validated: bool = False,
    n_samples: int = 12,
    n_tokens: int = 4,
) -> FineTuningTask:
    """A network that is linear in the weight of its adapted layer, in double precision.

    With ``started`` B is not zero at the start.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(n_samples, n_tokens, 6) @ torch.randn(6, 6) / 2
        y = torch.randint(3, (n_samples,))
        layer = AdaptedLinear(
            torch.nn.Linear(6, 5), rank, alpha, rank_stabilised=rank_stabilised, bias=bias
        )
        if started:
            layer.start()
        model = MeanOfTokens(layer, 5).double()
        others = torch.randn(5, 3, 6).double(), torch.randint(3, (5,))
    data = (x.double(), y)
    return FineTuningTask(model, data, validation_data=others if validated else None)
