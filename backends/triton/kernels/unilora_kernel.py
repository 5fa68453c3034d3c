"""Uni-LoRA's product, its factors gathered on the way (arXiv 2506.00799, section 3).

An entry of A or B is `theta[i] / sqrt(counts[i])` for its index i. The kernels read the index where a plain product
would read the factor, and fetch the two numbers from the vector, which stays in the cache: no factor is written, and
the vector is not scaled beforehand. Every tile of rows gathers anew, so this pays for few rows; for many the factors
are gathered once (`Share`). The gradient of the vector is one sum by index (`segment_sum.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ....passes.methods.unilora.gather import all_factors, flat, gather, scale_vector
from ....passes.methods.unilora.unilora import unilora as dialect_unilora
from ....passes.methods.unilora.vector_form import bank_unilora
from ....rewriter.dialect import reads
from .. import tiles
from ..example_launches import Empty, Shape, register_examples
from ..kernel_gate import Form, Sizes, aten, ours, row_bytes
from ..kernel_operator import kernel_operator
from ..launch import Launch
from ..low_rank import product, samples_of
from ..lower_shared import shared
from ..lowerings import Lowering, register
from ..optional_triton import jit, tl
from ..slots import chosen, factor_gradients, stacks, without_slot_0
from .segment_sum import segment_sum


@jit
def read_gathered(factor, slot, r, i, there):
    """Entries (r, i) of the factor whose index `(rank, width)` this is, from the slot's vector."""
    theta, counts, index, length, width = factor
    place = tl.load(index + r * width + i, there, other=0)
    uses = tl.load(counts + place, there, other=1).to(tl.float32)
    return tl.load(theta + slot * length + place, there, other=0.0).to(tl.float32) * tl.rsqrt(uses)


def launches(
    base: Tensor | None, x: Tensor, ids: Tensor | None, theta: Tensor, counts: Tensor, index_a: Tensor,
    index_b: Tensor, y: Tensor,
) -> list[Launch]:  # fmt: skip
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None.
        theta: `(d,)`, with ids `(K, d)`, any float dtype. counts: `(d,)` integers, at least 1.
        index_a: `(r, in)`, index_b: `(r, out)`, int32 below d.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    (rank, out), (slots, length) = index_b.shape, stacks(ids, theta)[0].shape
    vector = theta.contiguous(), counts.contiguous()
    t = tiles.low_rank(*samples_of(x, ids), x.shape[1], out, rank, x.itemsize).narrowed()
    of_a, of_b = ((*vector, index.contiguous(), length, index.shape[1]) for index in (index_a, index_b))
    return product(base, x, ids, slots, read_gathered, of_a, of_b, rank, 1.0, y, t)


def definition(
    base: Tensor | None, x: Tensor, ids: Tensor | None, theta: Tensor, counts: Tensor, index_a: Tensor, index_b: Tensor
) -> Tensor:
    """`base + x A^T B` with A and B gathered from the vector, for every sample from its slot's; slot 0 is no adapter.

    base `(..., out)` or None; x `(..., in)`, with ids `(batch, ..., in)` or `(batch * tokens, in)`; ids `(batch,)`
    int64 below K, or None; theta `(d,)`, with ids `(K, d)`; counts `(d,)`; index_a `(r, in)` and index_b `(r, out)`
    int32 -> `(..., out)` in x's dtype.
    """
    if ids is None:
        delta = dialect_unilora(x, theta, counts, index_a, index_b)
    else:
        delta = without_slot_0(bank_unilora(x, ids, theta, counts, index_a, index_b), ids)
    return delta if base is None else base + delta


def backward(
    g: Tensor, needs: Sequence[bool], x: Tensor, ids: Tensor | None, theta: Tensor, counts: Tensor, index_a: Tensor,
    index_b: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of x is the same operator; that of the vector comes through factors gathered for the moment."""
    gx = unilora(None, g, ids, theta, counts, index_b, index_a) if needs[0] else None
    if not needs[2]:
        return gx, None, None, None, None, None
    A, B = gather(scale_vector(chosen(ids, theta)[0], counts), (index_a, index_b))  # (samples, r, in or out)
    parts = factor_gradients(x, g, A, B, 1.0, (True, True))
    values = torch.cat([part.flatten(1) for part in parts if part is not None], 1).to(theta)
    index = flat((index_a, index_b)).to(theta.device)
    if ids is None:
        gtheta = segment_sum(values[0], index, theta.shape[0])
    else:  # a bank's vectors are frozen: rare, and not worth a kernel
        values = torch.where((ids == 0).view(-1, 1), 0, values)
        gtheta = torch.zeros_like(theta).index_put((ids[:, None], index.long()[None]), values, True)
    return gx, None, scale_vector(gtheta, counts), None, None, None


unilora = kernel_operator(
    "unilora(Tensor? base, Tensor x, Tensor? ids, Tensor theta, Tensor counts, Tensor index_a, Tensor index_b) "
    "-> Tensor",
    definition, launches, lambda *others: others[-1].shape[1], backward,
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.unilora.default


def _segment_sum(grads: list[Tensor], indices: list[Tensor], length: int) -> Tensor:
    return segment_sum(flat(grads), flat(indices), length)


@reads(fresh=True)
def summed_factors(theta: Tensor, counts: Tensor, indices: list[Tensor]) -> tuple[Tensor, ...]:
    """`all_factors` with the kernel's sum on the way back: of the same bits every run."""
    return all_factors(theta, counts, indices, sum_all=_segment_sum)


# -- registration --------------------------------------------------------------------------------------------------
_INDEX, _L2 = 4, 0.3  # bytes of an index; what a byte from the cache costs of one from memory


def _measure(*values: Any) -> tuple[int, int, int]:
    theta, _, _, index_b = values[-4:]
    return index_b.shape[1], index_b.shape[0], theta.itemsize


def _forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.rank * (s.inner + s.out)
    again = max(s.samples, -(-rows // 64)) - 1  # tiles that gather anew, from the cache
    gathers = entries * (_INDEX + again * (_INDEX + s.factor) * _L2)
    made = s.samples * entries * (2 * s.itemsize) + entries * _INDEX  # factors written and read; z, then the sum
    return ours(s, rows, gathers), aten(4, row_bytes(s, rows, 2 if s.samples == 1 else 4) + made)


register(dialect_unilora, Lowering(OPERATOR, lambda graph, given: (given[0], None, *given[1:]), _measure, _forms))
register(bank_unilora, Lowering(OPERATOR, lambda graph, given: given, _measure, _forms, bank=True))
shared[all_factors] = summed_factors


@register_examples("unilora")
def _examples(empty: Empty, s: Shape, x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[str, list[Launch]]]:
    theta, counts = empty(33, 524_288, dtype=torch.float32), empty(524_288, dtype=torch.uint8)
    indices = empty(4, s.inner, dtype=torch.int32), empty(4, s.out, dtype=torch.int32)
    if s.tokens == 1:
        yield f"bank, {s}, rank 4", launches(y, x, ids, theta, counts, *indices, y)
    else:
        yield f"one, {s}, rank 4", launches(y, x, None, theta[0], counts, *indices, y)
