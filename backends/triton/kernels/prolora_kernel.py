"""PRoLoRA on its chunks: the rotated copies are addresses, not memory (arXiv 2402.16902, section 3.2).

Entry (j, i) of an expanded factor lies in copy `k = i // c` of the chunk `(q, c)`, row `(j + k * stride) mod q`, column
`i mod c`; rows from q up are the unshared ranks'. Both factors are taken `(rank, long side)`, so the product and the
gradient of its input are one operator with the factors in each other's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....passes.graph.products import value
from ....passes.methods.prolora.prolora import prolora as dialect_prolora
from ....passes.methods.prolora.rotated_chunks import expand as expanded
from ....rewriter.dialect import cast
from .. import tiles
from ..example_launches import Empty, Shape, register_examples
from ..kernel_gate import Form, Sizes, aten, ours, row_bytes
from ..kernel_operator import kernel_operator
from ..launch import Launch
from ..low_rank import product
from ..lowerings import Arguments, Lowering, register
from ..optional_triton import jit, tl
from ..slots import factor_gradients


@jit
def read_rotated(factor, slot, j, i, there):
    """Entries (j, i) of the factor expanded from its chunk."""
    shared, unshared, ranks, turn, width, shared_rank, shared_long, unshared_rank, unshared_long = factor
    place = shared if unshared is None else unshared + (j - ranks) * unshared_rank + i * unshared_long
    if shared is not None:
        row = j + (i // width * turn) % ranks
        row = tl.where(row >= ranks, row - ranks, row)
        chunk = shared + row * shared_rank + (i % width) * shared_long
        place = chunk if unshared is None else tl.where(j < ranks, chunk, place)
    return tl.load(place, there, other=0.0)


def _factor(shared: Tensor | None, unshared: Tensor | None, chunks: int) -> tuple[Any, ...]:
    """What `read_rotated` takes: shared `(q, c)`, unshared `(u, long side)`, of one dtype."""
    ranks, width = (0, 1) if shared is None else shared.shape
    strides = [(0, 0) if t is None else t.stride() for t in (shared, unshared)]
    return shared, unshared, ranks, max(ranks // chunks, 1), width, *strides[0], *strides[1]


def launches(
    base: Tensor | None, x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None,
    B_unshared: Tensor | None, a_chunks: int, b_chunks: int, out_features: int, scale: float, y: Tensor,
) -> list[Launch]:  # fmt: skip
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other.
        A_shared: `(q, ceil(in / a_chunks))`, A_unshared: `(u, in)`, B_shared: `(q, ceil(out / b_chunks))`, B_unshared:
            `(u, out)`; any strides, any float dtype, None where there are no such ranks.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    if A_shared is not None and A_unshared is not None and B_shared is not None and B_unshared is not None:
        A_unshared, B_unshared = cast(A_unshared, A_shared), cast(B_unshared, B_shared)
    rank = sum(t.shape[0] for t in (A_shared, A_unshared) if t is not None)
    t = tiles.low_rank(1, x.shape[0], x.shape[1], out_features, rank, x.itemsize)
    t = t.narrowed(16, 32) if x.itemsize >= 4 else t.narrowed()
    of_a, of_b = _factor(A_shared, A_unshared, a_chunks), _factor(B_shared, B_unshared, b_chunks)
    return product(base, x, None, 1, read_rotated, of_a, of_b, rank, scale, y, t)


# -- operator ------------------------------------------------------------------------------------------------------
def _rows(shared: Tensor, chunks: int, back: bool = False) -> Tensor:
    """`(q, chunks)`: the chunk's row that copy k puts into row j; `back`: the row of copy k that chunk row j is in."""
    ranks = shared.shape[0]
    turn = max(ranks // chunks, 1) * torch.arange(chunks, device=shared.device)
    return (torch.arange(ranks, device=shared.device)[:, None] + (-turn if back else turn)) % ranks


def _full(shared: Tensor | None, unshared: Tensor | None, chunks: int, length: int) -> Tensor:
    """The factor in full, `(r, length)`, shared ranks first."""
    parts = [] if shared is None else [expanded(shared, _rows(shared, chunks), length)]
    return torch.cat([*parts, *([] if unshared is None else [unshared])])


def _to_chunks(
    grad: Tensor | None, shared: Tensor | None, unshared: Tensor | None, chunks: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both parts from that of the full factor `(1, r, length)`: summed over the copies."""
    if grad is None:
        return None, None
    ranks = 0 if shared is None else shared.shape[0]
    of_shared, of_unshared = grad[0, :ranks], grad[0, ranks:]
    if shared is not None:
        whole = F.pad(of_shared, (0, chunks * shared.shape[1] - grad.shape[2])).unflatten(1, (chunks, -1))
        of_shared = whole[_rows(shared, chunks, back=True), torch.arange(chunks, device=grad.device)].sum(1)
    return (
        None if shared is None else cast(of_shared, shared),
        None if unshared is None else cast(of_unshared, unshared),
    )


def definition(
    base: Tensor | None, x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None,
    B_unshared: Tensor | None, a_chunks: int, b_chunks: int, out_features: int, scale: float,
) -> Tensor:  # fmt: skip
    """`base + scale * x A^T B` with A `(r, in)` and B `(r, out)` expanded from their chunks.

    base `(..., out)` or None; x `(..., in)`; the factors as `launches` has them -> `(..., out)` in x's dtype.
    """
    A = _full(A_shared, A_unshared, a_chunks, x.shape[-1])
    B = _full(B_shared, B_unshared, b_chunks, out_features)
    delta = F.linear(F.linear(x, cast(A, x)) * scale, cast(B, x).t())
    return delta if base is None else base + delta


def backward(
    g: Tensor, needs: Sequence[bool], x: Tensor, A0: Tensor | None, Au: Tensor | None, B0: Tensor | None,
    Bu: Tensor | None, a_chunks: int, b_chunks: int, out_features: int, scale: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of x is the same operator; those of the factors are made on factors expanded for the moment."""
    inner = x.shape[-1]
    gx = prolora(None, g, B0, Bu, A0, Au, b_chunks, a_chunks, inner, scale) if needs[0] else None
    if not any(needs[1:5]):
        return gx, *[None] * 8
    A, B = _full(A0, Au, a_chunks, inner)[None], _full(B0, Bu, b_chunks, out_features)[None]
    ga, gb = factor_gradients(x, g, A, B, scale, (any(needs[1:3]), any(needs[3:5])))
    return gx, *_to_chunks(ga, A0, Au, a_chunks), *_to_chunks(gb, B0, Bu, b_chunks), None, None, None, None


prolora = kernel_operator(
    "prolora(Tensor? base, Tensor x, Tensor? A_shared, Tensor? A_unshared, Tensor? B_shared, Tensor? B_unshared, "
    "int a_chunks, int b_chunks, SymInt out_features, float scale) -> Tensor",
    definition, launches, lambda *others: others[6], backward,
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.prolora.default


# -- registration --------------------------------------------------------------------------------------------------
def _unknown(arguments: Arguments) -> str | None:
    unknown = any(rows is not None and value(rows) is None for rows in arguments[5:7])
    return "nothing is known of its chunks" if unknown else None


def _build(graph: fx.Graph, arguments: Arguments) -> Arguments:
    x, A_shared, A_unshared, B_shared, B_unshared, *rows, _, out, scale = arguments
    turned = [None if t is None else graph.call_function(torch.t, (t,)) for t in (B_shared, B_unshared)]
    chunks = [1 if (found := value(r)) is None else int(found.shape[1]) for r in rows]
    return x, A_shared, A_unshared, *turned, *chunks, out, scale


def _measure(x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, *others: Any) -> tuple[int, int, int]:
    kinds = [t for t in (A_shared, A_unshared) if t is not None]
    return others[5], sum(t.shape[0] for t in kinds), kinds[0].itemsize


def _forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.rank * (s.inner + s.out)
    chunks = entries // 4 * s.factor  # at least four copies are usual
    return ours(s, rows, chunks), aten(5, row_bytes(s, rows, 2) + chunks + 2 * entries * s.itemsize)


register(dialect_prolora, Lowering(OPERATOR, _build, _measure, _forms, refuse=_unknown))


@register_examples("prolora")
def _examples(empty: Empty, s: Shape, x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[str, list[Launch]]]:
    A0, B0 = empty(31, -(-s.inner // 7)), empty(-(-s.out // 7), 31).t()
    Au, Bu = empty(1, s.inner), empty(s.out, 1).t()
    yield f"{s}, rank 32, 7 chunks", launches(y, x, A0, Au, B0, Bu, 7, 7, s.out, 0.5, y)
