"""The tensors of a twin as inputs of a graph: what is opened, and random ones to hold the graph against."""

from __future__ import annotations

from typing import Any

import torch

from ....passes.models.opened import Twin
from ...adapterfiles.adapter_inputs import symbol
from ..graph import open_inputs
from .export_plan import Arrays, Truth


def randomised(twin: Twin, run: Truth) -> tuple[Truth, dict[str, torch.Tensor]]:
    """The twin with random tensors at its sites, as large as what they are added to, and these tensors by input name:
    what is wrong with a site shows, however small its own adapter is, or zero, as when nothing has been trained."""
    generator = torch.Generator().manual_seed(0)
    state = twin.module.state_dict()
    values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for site, (form, tensors) in twin.sites.items():
        for leg, own in tensors.items():
            key = f"{site}.{leg}"
            random = torch.randn(own.shape, generator=generator) / own.shape[-2] ** 0.5
            if form.slots:
                random[0] = 0  # the base model
            values[key] = state[twin.keys[site][leg]], random.to(own)

    def truth(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Arrays:
        before = [(held, held.clone()) for held, _ in values.values()]
        for held, random in values.values():
            held.copy_(random)
        try:
            return run(inputs, dtype)
        finally:
            for held, own in before:
                held.copy_(own)

    return truth, {key: random for key, (_, random) in values.items()}


def legs_of(twin: Twin) -> dict[str, dict[str, open_inputs.Opened]]:
    """What becomes an input at every site. One adapter is left out as tensors of size 0; stacks are there already."""
    sites: dict[str, dict[str, open_inputs.Opened]] = {}
    for site, (form, tensors) in twin.sites.items():
        symbols = {axis: symbol(site, axis) for axis in form.open_axes}
        for leg, tensor in tensors.items():
            axes = form.layout(leg)
            before = tensor.dim() - len(axes)  # of experts, which a graph has as many of as its model
            sizes = zip(axes, tensor.shape[before:], strict=True)
            shape = (*tensor.shape[:before], *(symbols.get(axis, size) for axis, size in sizes))
            default = tensor if form.slots else tensor.new_zeros([0 if isinstance(n, str) else n for n in shape])
            sites.setdefault(site, {})[leg] = open_inputs.Opened(twin.keys[site][leg], shape, default)
    return sites
