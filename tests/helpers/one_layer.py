"""A model of one layer, adapted with random values: what a method's formula is held against."""

from __future__ import annotations

import torch
from torch import nn

import fxgraft as fg


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def graft(layer, method, seed=0):
    """A model with one adapted site and its adapter's state, filled with random values."""
    adapted = fg.rewrite(Net(layer), fg.Spec(method, targets=["layer"]))
    generator = torch.Generator().manual_seed(seed)
    state = {
        k: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for k, t in fg.adapter_state(adapted).items()
    }
    fg.swap(adapted, state)
    return adapted, state
