"""Factors of a convolution as HF PEFT (0.21) stores them: A is a convolution `(r, in, *kernel)` with the base's stride
and padding, B one of 1x1 `(out, r / groups, 1...)`.

    here                        A (r, in / groups * k...), B (out, r), A the same for every group
    PEFT, groups = 1            the same numbers
    PEFT, several groups        A (groups * r, in, *kernel), each group's copy of A over the channels that it reads

PEFT's A reads all channels. One that was trained over groups is no adapter of a kernel with groups, nor does PEFT merge
it: it is refused, as is what PEFT leaves out of A, dilation and pads that are not zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....passes.methods.lora import LoRA
from ....rewriter.errors import CheckpointError
from ....rewriter.grafted_class import base_class


def is_convolution(module: nn.Module | None) -> bool:
    """Whether PEFT would wrap this module as a convolution, which its LoRA alone does."""
    return module is not None and issubclass(base_class(module), (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _check(layer: Any, site: str, what: str) -> None:
    """Raise where PEFT's A is no factor of the layer's kernel."""
    wide = [gap for gap, width in zip(layer.dilation, layer.kernel_size, strict=True) if width > 1]
    pads = layer.padding if isinstance(layer.padding, tuple) else (int(layer.padding == "same"),)
    left_out = ""
    if any(gap != 1 for gap in wide):
        left_out = f"dilation={tuple(layer.dilation)}"
    elif layer.padding_mode != "zeros" and any(pads):
        left_out = f"padding_mode={layer.padding_mode!r}"
    if left_out:
        raise CheckpointError(
            f"{what}: {site!r} has {left_out}, which PEFT leaves out of the factor beside it: it is another function "
            "there than any adapter of this kernel. Use format='fxgraft', or leave the layer out"
        )


def _scaled(method: LoRA, rank: int) -> LoRA:
    """The same scale at another rank."""
    return dataclasses.replace(method, rank=rank, alpha=method.scale * (rank**0.5 if method.rslora else rank))


def opened(
    layer: Any, given: Mapping[str, Tensor], method: LoRA, site: str, what: str
) -> tuple[dict[str, Tensor], LoRA]:
    """PEFT's factors as ours, and the method there."""
    _check(layer, site, what)
    A, B = given["lora_A"], given["lora_B"]
    rank, groups = method.rank, layer.groups
    there = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank // groups)
    if A.shape != there[0] or tuple(B.shape) != (*there[1], *(1,) * len(layer.kernel_size)) or rank % groups:
        raise CheckpointError(
            f"{what}: the factors of {site!r} are {tuple(A.shape)} and {tuple(B.shape)}, and the convolution there "
            f"takes {there[0]} and {there[1]} with kernels of 1"
        )
    if groups == 1:
        return {"lora_A": A.flatten(1), "lora_B": B.flatten(1)}, method
    blocks = A.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # (group, r / groups, channels of, ...)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    across = blocks.clone()
    for group in range(groups):
        across[group, :, group] = 0
    if across.any() or not torch.equal(own, own[:1].expand_as(own)):
        raise CheckpointError(
            f"{what}: {site!r} is a convolution with {groups} groups, and PEFT's factor there reads channels of every "
            "group: no kernel with groups computes that, nor can PEFT merge it. Train the layer here, or leave it out"
        )
    return {"lora_A": own[0].flatten(1), "lora_B": B.flatten(1)}, _scaled(method, rank // groups)


def stored(layer: Any, A: Tensor, B: Tensor, site: str, what: str) -> tuple[Tensor, Tensor]:
    """Our factors as PEFT's."""
    _check(layer, site, what)
    kernels = A.detach().unflatten(1, (-1, *layer.kernel_size))
    if layer.groups > 1:
        apart = kernels.new_zeros(layer.groups, kernels.shape[0], layer.groups, *kernels.shape[1:])
        for group in range(layer.groups):
            apart[group, :, group] = kernels
        kernels = apart.flatten(2, 3).flatten(0, 1)
    return kernels, B.detach().reshape(*B.shape, *(1,) * len(layer.kernel_size))


def stored_method(layer: Any, method: LoRA) -> LoRA:
    """The method as PEFT counts its rank."""
    return method if layer.groups == 1 else _scaled(method, method.rank * layer.groups)
