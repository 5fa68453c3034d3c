"""A model of three linears, adapters with an effect, and how far a value is from its oracle."""

from __future__ import annotations

import torch
from torch import nn

import fxgraft as fg


class MLP(nn.Module):
    """Rectangular, with and without bias."""

    def __init__(self, sizes: tuple[int, int, int, int] = (7, 11, 5, 3), bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(sizes[0], sizes[1])
        self.down = nn.Linear(sizes[1], sizes[2], bias=bias)
        self.head = nn.Linear(sizes[2], sizes[3])

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


def perturb(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Give every trained tensor a value that shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def noisy(model: nn.Module, name: str, seed: int) -> nn.Module:
    """Give one adapter random values of its own, the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in fg.adapter_state(model, name).values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def relative_error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest deviation from a float64 oracle, relative to the oracle's largest entry."""
    oracle = oracle.detach().double()
    return ((value.detach().double() - oracle).abs().max() / oracle.abs().max()).item()
