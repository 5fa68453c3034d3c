"""HydraLoRA's route-and-combine in two kernels (arXiv 2404.19245, section 3.2), and the bank of such adapters.

`shrink` reads x once for A and the router, whose rows follow one another in z; `expand_routed` makes the softmax of a
tile's logits, forms the numbers `w_i z_j` of all experts in registers and multiplies them by the experts' B, one under
the other: neither the weights nor the mixed numbers are written. The gates' exponents are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ....passes.methods.hydralora.hydralora import hydralora as dialect_hydralora
from ....passes.methods.hydralora.routed_form import bank_hydralora
from ....rewriter.dialect import cast
from .. import tiles
from ..example_launches import Empty, Shape, register_examples
from ..kernel_gate import Form, Sizes, aten, ours, row_bytes
from ..kernel_operator import kernel_operator
from ..launch import Launch
from ..low_rank import add_product, down, finish, load_parts, sample_tile, samples_of, up
from ..lowerings import Arguments, Lowering, register
from ..optional_triton import jit, tl
from ..slots import chosen, stacks, to_stack, without_slot_0


# -- kernels -------------------------------------------------------------------------------------------------------
@jit
def read_both(factor, slot, r, i, there):
    """Entries (r, i) of A and, below it, the router."""
    a, router, rank, experts, inner = factor
    of_a = a + (slot * rank + r) * inner + i
    of_router = router + (slot * experts + r - rank) * inner + i
    return tl.load(tl.where(r < rank, of_a, of_router), there, other=0.0)


@jit
def expand_routed(
    base, ids, z, factor, y, tiles, tokens, slots, rank, out, scale, base_row, z_part,
    BLOCK_E: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[row, :] = base[row, :] + scale * sum over i of softmax(logits[row, :])_i * z[row, :] B_i."""
    b, experts = factor
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    both, mixed = rank + experts, rank * experts
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if slot >= 0:
        e = tl.arange(0, BLOCK_E)
        gates = live[:, None] & (e < experts)[None, :]
        logits = load_parts(z, z_part, row, both, rank + e, gates, SPLIT, BLOCK_M, BLOCK_E)
        logits = tl.where((e < experts)[None, :], logits, float("-inf"))
        largest = tl.max(logits, 1)
        norm = scale / tl.sum(tl.exp(logits - largest[:, None]), 1)
        for start in range(0, mixed, BLOCK_R):
            p = start + tl.arange(0, BLOCK_R)
            there = live[:, None] & (p < mixed)[None, :]
            zs = load_parts(z, z_part, row, both, p % rank, there, SPLIT, BLOCK_M, BLOCK_R)
            ws = load_parts(z, z_part, row, both, rank + p // rank, there, SPLIT, BLOCK_M, BLOCK_R)
            ms = (tl.exp(ws - largest[:, None]) * norm[:, None] * zs).to(y.dtype.element_ty)
            place = b + (slot * mixed + p[:, None]) * out + n[None, :]
            fs = tl.load(place, (p < mixed)[:, None] & (n < out)[None, :], other=0.0)
            total = add_product(ms, fs, total, PRECISION, WIDE)
    finish(base, y, total, row, live, slot, n, out, base_row)


# -- launcher ------------------------------------------------------------------------------------------------------
def launches(
    base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, router: Tensor, B: Tensor, scale: float, y: Tensor
) -> list[Launch]:
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None.
        A: `(r, in)`, router: `(N, in)`, B: `(N * r, out)`; with ids A `(K, r, in)`, router `(K, N, in)`, B
            `(K, N, r, out)`. Any float dtype.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    A, router, B = (t.contiguous() for t in stacks(ids, A, cast(router, A), B))
    slots, rank, inner = A.shape
    experts, width = router.shape[1], rank + router.shape[1]
    t = tiles.low_rank(*samples_of(x, ids), inner, y.shape[1], width, x.itemsize).narrowed(stages=3)
    first, z = down(x, ids, slots, read_both, (A, router, rank, experts, inner), width, t)
    constants = {"BLOCK_E": max(16, tiles.power_of_two(experts))}
    return [first, up(base, ids, slots, z, (B, experts), rank, scale, y, t, constants, expand_routed, warps=8)]


# -- operator ------------------------------------------------------------------------------------------------------
def definition(
    base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, router: Tensor, B: Tensor, scale: float
) -> Tensor:
    """`base + scale * sum_i softmax(x router^T)_i * (x A^T) B_i`, for every sample with its slot's tensors; slot 0 is
    no adapter.

    base `(..., out)` or None; x `(..., in)`, with ids `(batch, ..., in)` or `(batch * tokens, in)`; ids `(batch,)`
    int64 below K, or None; A `(r, in)`, router `(N, in)`, B `(N * r, out)`; with ids A `(K, r, in)`, router
    `(K, N, in)`, B `(K, N, r, out)` -> `(..., out)` in x's dtype.
    """
    if ids is None:
        delta = dialect_hydralora(x, x, A, router, B, scale)
    else:
        delta = without_slot_0(bank_hydralora(x, ids, A, router, B * scale if scale != 1 else B), ids)
    return delta if base is None else base + delta


def backward(
    g: Tensor, needs: Sequence[bool], x: Tensor, ids: Tensor | None, A: Tensor, router: Tensor, B: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    """Five products over all rows and a softmax's few numbers between them, which the compiler fuses: ATen."""
    out = B.shape[-1]
    a, gate, b = (cast(t, x) for t in chosen(ids, A, router, B))
    samples, rank, experts = a.shape[0], a.shape[1], gate.shape[1]
    b = b.reshape(samples, -1, out)
    xs, gs = x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, out)
    z = torch.bmm(xs, a.transpose(1, 2))
    w = torch.bmm(xs, gate.transpose(1, 2)).softmax(-1, dtype=torch.float32)
    gm = torch.bmm(gs, b.transpose(1, 2)).unflatten(-1, (experts, rank)).float() * scale
    gz = (w.unsqueeze(-1) * gm).sum(-2).to(x.dtype)
    gw = (gm * z.unsqueeze(-2)).sum(-1)
    gl = (w * (gw - (w * gw).sum(-1, keepdim=True))).to(x.dtype)
    gx = ga = grouter = gb = None
    if needs[0]:
        gx = (torch.bmm(gz, a) + torch.bmm(gl, gate)).reshape(x.shape)
        gx = gx if ids is None else without_slot_0(gx, ids)
    if needs[2]:
        ga = to_stack(torch.bmm(gz.transpose(1, 2), xs), ids, A)
    if needs[3]:
        grouter = to_stack(torch.bmm(gl.transpose(1, 2), xs), ids, router)
    if needs[4]:
        mixed = (w.unsqueeze(-1) * z.unsqueeze(-2) * scale).flatten(-2).to(x.dtype)
        one = B.shape if ids is None else B.shape[1:]
        gb = to_stack(torch.bmm(mixed.transpose(1, 2), gs).view(-1, *one), ids, B)
    return gx, None, ga, grouter, gb, None


hydralora = kernel_operator(
    "hydralora(Tensor? base, Tensor x, Tensor? ids, Tensor A, Tensor router, Tensor B, float scale) -> Tensor",
    definition, launches, lambda ids, A, router, B, scale: B.shape[-1], backward,
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.hydralora.default


# -- registration --------------------------------------------------------------------------------------------------
_EXPERTS = 4  # what the cost rule takes for the number of experts: 2 to 4 are usual


def _measure(x: Tensor, other: Tensor, A: Tensor, router: Tensor, B: Tensor, scale: float) -> tuple[int, int, int]:
    return B.shape[1], A.shape[0], B.itemsize


def _measure_bank(x: Tensor, ids: Tensor, A: Tensor, router: Tensor, B: Tensor) -> tuple[int, int, int]:
    return B.shape[3], B.shape[2], B.itemsize


def _forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    down, up = (s.rank + _EXPERTS) * s.inner, s.rank * _EXPERTS * s.out
    return ours(s, rows, (down + up) * s.factor), aten(6, row_bytes(s, rows, 4) + (3 * down + up) * s.itemsize)


def _bank_forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.samples * ((s.rank + _EXPERTS) * s.inner + s.rank * _EXPERTS * s.out)
    moved = entries * (s.factor + 2 * s.itemsize)
    return ours(s, rows, entries * s.factor), aten(8, row_bytes(s, rows, 4) + moved)


def _two_inputs(arguments: Arguments) -> str | None:
    return None if arguments[0] is arguments[1] else "dropout is on: A and the router read different inputs"


register(
    dialect_hydralora,
    Lowering(OPERATOR, lambda graph, given: (given[0], None, *given[2:]), _measure, _forms, refuse=_two_inputs),
)
register(bank_hydralora, Lowering(OPERATOR, lambda graph, given: (*given, 1.0), _measure_bank, _bank_forms, bank=True))


@register_examples("hydralora")
def _examples(empty: Empty, s: Shape, x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[str, list[Launch]]]:
    A, router, B = empty(33, 8, s.inner), empty(33, 3, s.inner), empty(33, 3, 8, s.out)
    if s.tokens == 1:
        yield f"bank, {s}, rank 8, 3 experts", launches(y, x, ids, A, router, B, 1.0, y)
    else:
        yield f"one, {s}, rank 8, 3 experts", launches(y, x, None, A[0], router[0], B[0].flatten(0, 1), 8.0, y)
