"""LoRA and its bank (arXiv 2106.09685; Punica's SGMV, arXiv 2310.18547, section 4): factors read as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....passes.methods.lora import lora as dialect_lora
from ....passes.methods.low_rank_form import bank_lora
from ....rewriter.dialect import cast
from .. import tiles
from ..example_launches import Empty, Shape, register_examples
from ..kernel_gate import Form, Sizes, aten, ours, row_bytes
from ..kernel_operator import kernel_operator
from ..launch import Launch
from ..low_rank import product, read_strided, samples_of
from ..lowerings import Arguments, Lowering, register
from ..slots import chosen, factor_gradients, stacks, to_stack, without_slot_0


def launches(
    base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, scale: float, y: Tensor
) -> list[Launch]:
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None.
        A: `(r, in)`, with ids `(K, r, in)`. B: `(r, out)`, with ids `(K, r, out)`. Any strides, any float dtype.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    A, B = stacks(ids, A, B)
    slots, rank, out = B.shape
    t = tiles.low_rank(*samples_of(x, ids), x.shape[1], out, rank, x.itemsize)
    of_a, of_b = (A, *A.stride()), (B, *B.stride())
    return product(base, x, ids, slots, read_strided, of_a, of_b, rank, scale, y, t)


def definition(base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`base + scale * x A^T B`, for every sample with the factors of its slot; slot 0 is no adapter.

    base `(..., out)` or None; x `(..., in)`, with ids `(batch, ..., in)` or `(batch * tokens, in)`; ids `(batch,)`
    int64 below K, or None; A `(r, in)`, with ids `(K, r, in)`; B `(r, out)`, with ids `(K, r, out)` -> `(..., out)` in
    x's dtype.
    """
    if ids is None:
        delta = F.linear(F.linear(x, cast(A, x)) * scale, cast(B, x).t())
    else:
        delta = without_slot_0(bank_lora(x, ids, A, B * scale if scale != 1 else B), ids)
    return delta if base is None else base + delta


def backward(
    g: Tensor, needs: Sequence[bool], x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    """The gradient of x is the same operator with the factors in each other's place."""
    gx = lora(None, g, ids, B, A, scale) if needs[0] else None
    if not (needs[2] or needs[3]):
        return gx, None, None, None, None
    one_a, one_b = chosen(ids, A, B)
    ga, gb = factor_gradients(x, g, one_a, one_b, scale, needs[2:4])
    return gx, None, to_stack(ga, ids, A), to_stack(gb, ids, B), None


lora = kernel_operator(
    "lora(Tensor? base, Tensor x, Tensor? ids, Tensor A, Tensor B, float scale) -> Tensor",
    definition, launches, lambda ids, A, B, scale: B.shape[-1], backward,
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.lora.default


# -- registration --------------------------------------------------------------------------------------------------
def forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.rank * (s.inner + s.out)
    casts = 2 if s.factor != s.itemsize else 0
    moved = entries * (s.itemsize + (s.itemsize + s.factor if casts else 0))
    return ours(s, rows, entries * s.factor), aten(3 + casts, row_bytes(s, rows, 2) + moved)


def _bank_forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.samples * s.rank * (s.inner + s.out)  # picked out of the stacks and written, then read; z, delta, sum
    moved = entries * (s.factor + 2 * s.itemsize)
    return ours(s, rows, entries * s.factor), aten(5, row_bytes(s, rows, 4) + moved)


def _build(graph: fx.Graph, arguments: Arguments) -> Arguments:
    x, A, B, scale = arguments
    return x, None, A, graph.call_function(torch.t, (B,)), scale


def _measure(x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[int, int, int]:
    return B.shape[0], B.shape[1], B.itemsize


def _measure_bank(x: Tensor, ids: Tensor, A: Tensor, B: Tensor) -> tuple[int, int, int]:
    return B.shape[2], B.shape[1], B.itemsize


register(dialect_lora, Lowering(OPERATOR, _build, _measure, forms))
register(bank_lora, Lowering(OPERATOR, lambda graph, given: (*given, 1.0), _measure_bank, _bank_forms, bank=True))


@register_examples("lora")
def _examples(empty: Empty, s: Shape, x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[str, list[Launch]]]:
    A, B = empty(33, s.rank, s.inner), empty(33, s.rank, s.out)
    yield f"bank, {s}, rank {s.rank}", launches(y, x, ids, A, B, 1.0, y)
    one: dict[str, Any] = {"dtype": torch.float32}
    A, B = empty(s.rank, s.inner, **one), empty(s.out, s.rank, **one).t()
    yield f"one, {s}, rank {s.rank}, no base", launches(None, x, None, A, B, 2.0, y)
