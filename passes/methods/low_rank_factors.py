"""The factors of an adapter of any low-rank method: `delta W = B A` at every site.

Does not handle methods that are not a low-rank product (GLoRA, HydraLoRA): they are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...rewriter.errors import MergeError
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.products.stacked_matrices import factors
from ...rewriter.state import AdapterRecord, record_of
from ...rewriter.tensors import adapter_modules


def low_rank(root: nn.Module, name: str) -> AdapterRecord:
    """The record of an adapter; `MergeError` with the reason where it has no low-rank factors."""
    record = record_of(root, name)
    for group in record.groups:
        if group.method.not_low_rank:
            raise MergeError(
                f"adapter {name!r} ({type(group.method).__name__}) has no low-rank factors: {group.method.not_low_rank}"
            )
    return record


def linear_factors(adapted: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site `A (r, in)` and `B (out, r)` with `delta W = B A`, in float32 (or wider), scales folded into B;
    stacked `(E, ...)` where the weight stacks experts' matrices."""
    root = unwrap(adapted)
    record = low_rank(root, name)
    found = {}
    with torch.no_grad():
        for _, tensors in adapter_modules(root, name, record):
            if tensors.site is None:
                continue
            shared, local = widened(tensors.shared_tensors()), widened(tensors.tensors())
            found[tensors.site.name] = factors(tensors.method, tensors.site, shared, local)
    return found


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32 where they are narrower, detached."""
    return {
        name: t.detach().float() if t.is_floating_point() and t.itemsize < 4 else t.detach()
        for name, t in tensors.items()
    }
