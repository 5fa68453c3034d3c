"""Samples with the tensors of their own slots, in the plain PyTorch around the kernels; slot 0 is no adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...rewriter.dialect import cast


def stacks(ids: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Stacks `(slots, ...)`: as they are, or of the one adapter where there are no ids."""
    return tensors if ids is not None else tuple(t.unsqueeze(0) for t in tensors)


def chosen(ids: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`(samples, ...)`: the entries of all samples, one sample where there are no ids."""
    return stacks(ids, *tensors) if ids is None else tuple(t.index_select(0, ids) for t in tensors)


def without_slot_0(delta: Tensor, ids: Tensor) -> Tensor:
    """The delta `(samples, ...)` or `(samples * tokens, ...)`, zero where a sample has no adapter."""
    apart = delta.reshape(ids.shape[0], -1, delta.shape[-1])
    return torch.where((ids == 0).to(delta.device).view(-1, 1, 1), 0, apart).view_as(delta)


def to_stack(grads: Tensor | None, ids: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradients of the samples' tensors, added up by slot; slot 0 gets none."""
    if grads is None or ids is None:
        return None if grads is None else cast(grads.squeeze(0), like)
    grads = torch.where((ids == 0).view(-1, *[1] * (grads.dim() - 1)), 0, grads)
    return torch.zeros_like(like).index_add(0, ids, cast(grads, like))


def factor_gradients(
    x: Tensor, g: Tensor, A: Tensor, B: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `scale * x A^T B`: x `(..., in)`, g `(..., out)`, A `(samples, r, in)`, B `(samples, r, out)`; None where not
    needed.

    Plain products over the rows, which cuBLAS does well: ATen. z is made anew: r numbers a row for one more read of x.
    """
    xs, gs = (t.reshape(A.shape[0], -1, t.shape[-1]) for t in (x, g))
    ga = gb = None
    if needs[0]:
        gz = torch.bmm(gs, cast(B, g).transpose(1, 2)) * scale
        ga = torch.bmm(gz.transpose(1, 2), xs)
    if needs[1]:
        z = torch.bmm(xs, cast(A, x).transpose(1, 2)) * scale
        gb = torch.bmm(z.transpose(1, 2), gs)
    return ga, gb
