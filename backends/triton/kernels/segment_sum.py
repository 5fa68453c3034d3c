"""Sum by index with the same bits every run: the way back of a projection with one non-zero per row.

    result[j] = sum of values[p] over all p with index[p] == j

Float atomics would add in whatever order the programs come, and a sorted order would be a table as large as the
projection. Integers add up to the same in any order: every value becomes a 64-bit multiple of one power of two, chosen
so that even all of them in one place cannot overflow, atomics add these, and the total is turned back. The power lies
`62 - log2(len(values))` bits below the largest value (38 for 12.5 million), so against that the error is far below
float32's. A NaN or an infinity anywhere makes the whole result NaN, which a gradient scaler looks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..example_launches import Empty, Shape, register_examples
from ..kernel_operator import NAMESPACE
from ..launch import Launch, run
from ..optional_triton import jit, runs_on, tl

_BLOCK = 1024


# -- kernel --------------------------------------------------------------------------------------------------------
@jit
def scatter(values, index, inverse, total, count, BLOCK: tl.constexpr):
    """total[index[p]] += values[p] * inverse, as integers."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + p, p < count, other=0.0).to(tl.float64) * tl.load(inverse)
    tl.atomic_add(total + tl.load(index + p, p < count, other=0), value.to(tl.int64), p < count, sem="relaxed")


# -- launcher ------------------------------------------------------------------------------------------------------
def launches(values: Tensor, index: Tensor, inverse: Tensor, total: Tensor) -> list[Launch]:
    """The one call.

    Args:
        values: `(D,)` contiguous, any float dtype. index: `(D,)` contiguous integers below `len(total)`.
        inverse: one float64, how many units there are in 1.0.
        total: `(d,)` int64, zero; added to.
    """
    count = values.shape[0]
    arguments = {"values": values, "index": index, "inverse": inverse, "total": total, "count": count}
    return [Launch(scatter, (-(-count // _BLOCK),), arguments, {"BLOCK": _BLOCK})]


def _launch(values: Tensor, index: Tensor, length: int) -> Tensor:
    if not runs_on(values) or values.numel() == 0:
        return definition(values, index, length)
    largest = torch.linalg.vector_norm(values, math.inf).double()
    exponent = torch.frexp(largest).exponent + math.ceil(math.log2(values.numel())) - 62
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    total = torch.zeros(length, dtype=torch.int64, device=values.device)
    run(launches(values.contiguous(), index.contiguous(), unit.reciprocal(), total))
    return (total * torch.where(largest.isfinite(), unit, torch.nan)).to(values.dtype)


# -- operator ------------------------------------------------------------------------------------------------------
def definition(values: Tensor, index: Tensor, length: int) -> Tensor:
    """values `(D,)`, index `(D,)` integers below length -> `(length,)` in values' dtype."""
    return values.new_zeros(length).index_add(0, index, values)


segment_sum = torch.library.custom_op(
    f"{NAMESPACE}::segment_sum", _launch, mutates_args=(), device_types=("cuda", "cpu"),
    schema="(Tensor values, Tensor index, SymInt length) -> Tensor",
)  # fmt: skip


@segment_sum.register_fake
def _(values, index, length):  # type: ignore[no-untyped-def]
    return values.new_empty(length)


@register_examples("segment_sum")
def _examples(empty: Empty, s: Shape, x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[str, list[Launch]]]:
    values, index = empty(2**23, dtype=torch.float32), empty(2**23, dtype=torch.int32)
    unit, total = empty(1, dtype=torch.float64), empty(524_288, dtype=torch.int64)
    yield "any", launches(values, index, unit, total)
