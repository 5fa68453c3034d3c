"""Uni-LoRA's projection as other programs store it: the index of every entry of every factor, and its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ....passes.methods.unilora.unilora import UniLoRA
from ....rewriter.errors import CheckpointError
from .foreign_folder import Sites, in_model_order

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # site -> what belongs to A `(r, in)` and to B `(out, r)`


def pairs(sites: Sites, stem: str, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Those of the tensors `<stem>_A` and `<stem>_B`, in the order in which a projection is handed out."""
    return {site: (sites[site][f"{stem}_A"], sites[site][f"{stem}_B"]) for site in in_model_order(sites, model)}


def stored_unilora(method: UniLoRA, theta: Tensor, indices: Pairs, what: str) -> tuple[UniLoRA, dict[str, Tensor]]:
    """A Uni-LoRA whose projection is given instead of derived: the method and its tensors.

    Args:
        method: its sampler is replaced by `stored`.
        theta: `(d,)`.
        indices: whole numbers below d.
    """
    if tuple(theta.shape) != (method.vector_length,):
        raise CheckpointError(
            f"{what}: 'theta' is {tuple(theta.shape)}, the model's is {(method.vector_length,)} by its config"
        )
    tensors = {"theta": theta}
    for site, pair in indices.items():
        # the operator reads B transposed
        for key, index in (("index_a", pair[0]), ("index_b", pair[1].t())):
            if index.is_floating_point() or index.dtype == torch.bool:
                raise CheckpointError(f"{what}: the indices of {site!r} are {index.dtype}, expected whole numbers")
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < method.vector_length:
                raise CheckpointError(
                    f"{what}: {site!r} has indices from {int(index.min())} to {int(index.max())}, the vector has the "
                    f"entries 0 to {method.vector_length - 1}"
                )
            tensors[f"{site}.{key}"] = index.to(torch.int32)
    tensors["counts"] = torch.from_numpy(_used(indices, method.vector_length)).to(torch.int32)
    # the seed says nothing any more, and must not make two such adapters look different
    return replace(method, sampler="stored", seed=UniLoRA.seed), tensors


def not_counts(indices: Pairs, scales: Pairs, length: int, what: str) -> list[str]:
    """The factors whose stored scales are not Uni-LoRA's, `1 / sqrt(how often the entry is used)`, up to rounding."""
    expected = torch.from_numpy(_used(indices, length)).double().rsqrt()
    odd = []
    for site, pair in scales.items():
        for letter, index, scale in zip("AB", indices[site], pair, strict=True):
            if scale.shape != index.shape or not scale.is_floating_point():
                raise CheckpointError(
                    f"{what}: the norms of {site!r} are {tuple(scale.shape)} {scale.dtype}, its indices "
                    f"{tuple(index.shape)}: expected a floating number for each"
                )
            near = 4 * torch.finfo(scale.dtype).eps
            if not torch.allclose(scale.double(), expected[index.long()], rtol=near, atol=0):
                odd.append(f"{site!r} ({letter})")
    return odd


def flat(indices: Pairs) -> np.ndarray:
    """All of them, A before B."""
    return np.concatenate([index.flatten().numpy() for pair in indices.values() for index in pair])


def _used(indices: Pairs, length: int) -> np.ndarray:
    """How often each entry of a vector is used, `(length,)`; 1 for those that are not, which have no scale."""
    return np.maximum(np.bincount(flat(indices), minlength=length), 1)
