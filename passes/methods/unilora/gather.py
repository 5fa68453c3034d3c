"""The factors of Uni-LoRA sites: entries of one vector, scaled and gathered.

The scale depends on the index alone, so it is folded into the vector, once for all factors gathered together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def scale_vector(theta: Tensor, counts: Tensor) -> Tensor:
    """`theta_j / sqrt(n_j)`, in theta's dtype: theta `(..., d)`, counts `(d,)` of any integer dtype."""
    return theta * counts.to(theta.dtype).rsqrt()


def gather(scaled: Tensor, indices: Sequence[Tensor]) -> list[Tensor]:
    """The entries of a scaled vector `(..., d)` at every index (int32), each `(..., *index.shape)`, where its index is:
    the vector of a model spread over devices lives on the first."""
    return [
        (scaled if scaled.device == index.device else scaled.to(index.device))
        .index_select(-1, index.flatten())
        .view(*scaled.shape[:-1], *index.shape)
        for index in indices
    ]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of some tensors one after the other, where the first lies."""
    return torch.cat([tensor.to(tensors[0].device).flatten() for tensor in tensors])


def sum_by_index(grads: Sequence[Tensor], indices: Sequence[Tensor], length: int) -> Tensor:
    """The gradient of a scaled vector `(length,)` from those of its factors: one sum, not one per gather."""
    values = flat(grads)
    return values.new_zeros(length).index_add(0, flat(indices), values)


class _GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gather_all, sum_all, scaled, *indices):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(*indices)
        ctx.length, ctx.sum_all = scaled.shape[0], sum_all
        return tuple(gather_all(scaled, list(indices)))

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def, override]
        total = ctx.sum_all(list(grads), list(ctx.saved_tensors), ctx.length)
        return None, None, total, *(None for _ in grads)


def all_factors(
    theta: Tensor,
    counts: Tensor,
    indices: list[Tensor],
    gather_all: Callable[[Tensor, list[Tensor]], Sequence[Tensor]] = gather,
    sum_all: Callable[[list[Tensor], list[Tensor], int], Tensor] = sum_by_index,
) -> tuple[Tensor, ...]:
    """A and B of all sites, in the order and shapes of `indices`, from the vector scaled once.

    Args:
        gather_all, sum_all: operators that do what `gather` and `sum_by_index` do.
    """
    return _GatherAll.apply(gather_all, sum_all, scale_vector(theta, counts), *indices)  # type: ignore[return-value, no-untyped-call]
