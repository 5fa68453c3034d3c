"""Factors that repeat a small chunk, rotated along the rank: expanded, or multiplied chunk by chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation(shared: int, chunks: int) -> Tensor:
    """`(shared, chunks)` int64: entry (j, k) is the chunk's row that copy k puts into row j."""
    stride = max(shared // chunks, 1)
    return (torch.arange(shared)[:, None] + stride * torch.arange(chunks)) % shared


def expand(chunk: Tensor, rows: Tensor, length: int) -> Tensor:
    """The rotated copies side by side: chunk `(q, c)`, rows `(q, m)` -> `(q, length)`, `length <= m * c`."""
    # one gather: m times `torch.roll` costs m dispatches here and m zero-filled gradients in the backward pass
    return chunk.index_select(0, rows.flatten()).view(chunk.shape[0], -1).narrow(1, 0, length)


#: What the further operators of the chunked way cost, in elements moved: 100 000 is the break-even measured on CPU; a
#: launch on an accelerator costs a few microseconds, in which it moves millions (an estimate, not measured).
_DISPATCH = {"cpu": 100_000}
_DISPATCH_ELSEWHERE = 10_000_000


def chunks_are_cheaper(tokens: object, length: int, rows: Tensor) -> bool:
    """The cost rule: whether to leave a factor in chunks (True) or to expand it first (False).

    Both ways do the same multiplications, `tokens * q * length`; they differ in what else they move. Expanding writes
    the full factor and the product reads it back: `2 * q * length` elements, once per call. In chunks the rotation is
    applied to the small side, q numbers per token and copy, written, rotated and read: `3 * tokens * m * q` elements;
    where the copies overlap the end, the large side (x padded, or the sum cut) is copied: `2 * tokens * length`; and
    about five more operators are called (`_DISPATCH`). So chunks win for few tokens of wide layers with many shared
    ranks, on CPU; expanding wins for batches.

    A number of tokens that is not a plain integer is symbolic: a graph for any size must not depend on it, so the
    answer is False, which is never far off (the factor is then a constant of the graph in serving).
    """
    if type(tokens) is not int:
        return False
    q, m = rows.shape
    padded = 0 if length % m == 0 else 2 * tokens * length
    dispatch = _DISPATCH.get(rows.device.type, _DISPATCH_ELSEWHERE)
    return 3 * tokens * m * q + padded + dispatch < 2 * q * length


def chunked_a(x: Tensor, chunk: Tensor, rows: Tensor) -> Tensor:
    """`x (..., in)` times the expanded A, transposed, without making it: -> `(..., q)`."""
    width = rows.shape[1] * chunk.shape[1]
    x = F.pad(x, (0, width - x.shape[-1])) if width != x.shape[-1] else x
    products = F.linear(x.unflatten(-1, (rows.shape[1], chunk.shape[1])), chunk)  # (..., m, q), not yet rotated
    return products.gather(-1, rows.t().expand_as(products)).sum(-2)


def chunked_b(z: Tensor, chunk: Tensor, rows: Tensor, length: int) -> Tensor:
    """`z (..., q)` times the expanded B, transposed, without making it; chunk `(c, q)` -> `(..., length)`."""
    index = rows.t().expand(*z.shape[:-1], rows.shape[1], rows.shape[0])
    rotated = z.new_zeros(index.shape).scatter(-1, index, z.unsqueeze(-2).expand(index.shape))  # (..., n, q)
    return F.linear(rotated, chunk).flatten(-2).narrow(-1, 0, length)
