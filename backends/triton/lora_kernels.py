"""Grouped low-rank product: every sample with the factors of its own adapter, or all with one.

The operation is Punica's SGMV (Chen et al., arXiv 2310.18547, section 4), for samples instead of sorted segments: a
tile holds tokens of one sample, so the ids are read as they are and nothing is sorted. Two kernels: `shrink` makes
`z = x A^T`, cut along the input where there are few rows, its parts in float32; `expand` adds the parts in a fixed
order (no atomics: the same bits every run), multiplies by B and adds the base's output on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...passes.graph.products import value
from ...passes.methods.lora import lora as dialect_lora
from ...passes.methods.low_rank_form import bank_lora
from ...rewriter.dialect import cast
from .gates import Form, Sizes, aten, ours, row_bytes
from .language import INTERPRETED, jit, precision, runs_on, tl
from .launch import Launch, run
from .registry import Arguments, Lowering, register, samples
from .tiles import Tiles, low_rank

NAMESPACE = "fxgraft_kernels"


# -- kernels -------------------------------------------------------------------------------------------------------
@jit
def sample_tile(ids, tile, tiles, tokens, slots, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile of tokens: their rows in x, which of them exist, and the slot, -1 for none and -2 for a wrong id."""
    sample = tile // tiles
    token = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = sample.to(tl.int64) * tokens + token
    slot = tl.zeros((), tl.int64)
    if GROUPED:
        slot = tl.load(ids + sample).to(tl.int64)
        slot = tl.where((slot < 0) | (slot >= slots), -2, tl.where(slot == 0, -1, slot))
    return row, token < tokens, slot


@jit
def shrink(
    x, ids, a, z, tiles, tokens, slots, inner, rank, x_row, a_slot, a_rank, a_inner, z_part,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z[split, row, :] = the part of x[row, :] A[slot]^T of every SPLIT-th step along the input."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, GROUPED, BLOCK_M)
    part = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if slot >= 0:
        for start in range(part * BLOCK_K, inner, SPLIT * BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xs = tl.load(x + row[:, None] * x_row + k[None, :], live[:, None] & (k < inner)[None, :], other=0.0)
            factor = a + slot * a_slot + r[None, :] * a_rank + k[:, None] * a_inner
            fs = tl.load(factor, (r < rank)[None, :] & (k < inner)[:, None], other=0.0).to(xs.dtype)
            if WIDE:
                xs, fs = xs.to(tl.float32), fs.to(tl.float32)
            total = tl.dot(xs, fs, total, input_precision=PRECISION)
        there = live[:, None] & (r < rank)[None, :]
        tl.store(z + part * z_part + row[:, None] * rank + r[None, :], total, there)


@jit
def load_parts(
    z, z_part, row, stride, r, there, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """z[row, r] where it is `there`, its parts added in their order."""
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for part in range(SPLIT):
        total += tl.load(z + part * z_part + row[:, None] * stride + r[None, :], there, other=0.0)
    return total


@jit
def finish(base, y, total, row, live, slot, n, out, base_row, HAS_BASE: tl.constexpr):
    """y[row, n] = base[row, n] + total; NaN where the id was wrong: loud, and nothing outside was read."""
    there = live[:, None] & (n < out)[None, :]
    total = tl.where(slot == -2, float("nan"), total)
    if HAS_BASE:
        total += tl.load(base + row[:, None] * base_row + n[None, :], there, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * out + n[None, :], total.to(y.dtype.element_ty), there)


@jit
def expand(
    base, ids, z, b, y, tiles, tokens, slots, rank, out, scale, base_row, b_slot, b_rank, b_out, z_part,
    HAS_BASE: tl.constexpr, GROUPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[row, :] = base[row, :] + scale * z[row, :] B[slot]."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, GROUPED, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if slot >= 0:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            there = live[:, None] & (r < rank)[None, :]
            zs = load_parts(z, z_part, row, rank, r, there, SPLIT, BLOCK_M, BLOCK_R) * scale
            zs = zs.to(y.dtype.element_ty)
            factor = b + slot * b_slot + r[:, None] * b_rank + n[None, :] * b_out
            fs = tl.load(factor, (r < rank)[:, None] & (n < out)[None, :], other=0.0).to(zs.dtype)
            if WIDE:
                zs, fs = zs.to(tl.float32), fs.to(tl.float32)
            total = tl.dot(zs, fs, total, input_precision=PRECISION)
    finish(base, y, total, row, live, slot, n, out, base_row, HAS_BASE)


# -- launcher ------------------------------------------------------------------------------------------------------
def rows_of(x: Tensor) -> Tensor:
    """`(rows, features)`, features one after the other."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def samples_of(x: Tensor, ids: Tensor | None) -> tuple[int, int]:
    """How many samples the rows `(rows, features)` are, and of how many tokens each."""
    return (1, x.shape[0]) if ids is None else (ids.shape[0], x.shape[0] // max(1, ids.shape[0]))


def grid_arguments(x: Tensor, ids: Tensor | None, tiles: Tiles, slots: int) -> tuple[int, dict[str, Any]]:
    """How many tiles of tokens there are, and what every kernel is told of them."""
    samples, tokens = samples_of(x, ids)
    per_sample = -(-tokens // tiles.rows)
    return samples * per_sample, {"tiles": per_sample, "tokens": tokens, "slots": slots}


def launches(
    base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, scale: float, y: Tensor
) -> list[Launch]:
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None where A and B are one adapter.
        A: `(K, r, in)`, any strides. B: `(K, r, out)`, any strides. Both of any float dtype.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    rows, inner = x.shape
    slots, rank, out = B.shape
    t = low_rank(*samples_of(x, ids), inner, out, rank, x.itemsize)
    z = x.new_empty((t.split, rows, rank), dtype=torch.float32)
    count, common = grid_arguments(x, ids, t, slots)
    shared = {
        "GROUPED": ids is not None, "SPLIT": t.split, "BLOCK_M": t.rows, "PRECISION": precision(),
        "WIDE": INTERPRETED,
    }  # fmt: skip
    of_shrink = {**shared, "BLOCK_R": t.rank, "BLOCK_K": t.inner}
    of_expand = {**shared, "HAS_BASE": base is not None, "BLOCK_R": min(t.rank, 32), "BLOCK_N": t.out}
    down = {
        "x": x, "ids": ids, "a": A, "z": z, **common, "inner": inner, "rank": rank, "x_row": x.stride(0),
        "a_slot": A.stride(0), "a_rank": A.stride(1), "a_inner": A.stride(2), "z_part": rows * rank,
    }  # fmt: skip
    up = {
        "base": base, "ids": ids, "z": z, "b": B, "y": y, **common, "rank": rank, "out": out, "scale": scale,
        "base_row": 0 if base is None else base.stride(0), "b_slot": B.stride(0), "b_rank": B.stride(1),
        "b_out": B.stride(2), "z_part": rows * rank,
    }  # fmt: skip
    return [
        Launch(shrink, (count, -(-rank // t.rank), t.split), down, of_shrink, t.warps, t.stages),
        Launch(expand, (count, -(-out // t.out)), up, of_expand, t.warps, 2),
    ]


def stacks(ids: Tensor | None, *factors: Tensor) -> tuple[Tensor, ...]:
    return factors if ids is not None else tuple(factor.unsqueeze(0) for factor in factors)


def _launch(base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    if not runs_on(x):
        return definition(base, x, ids, A, B, scale).contiguous()  # as the kernel's
    A, B = stacks(ids, A, B)
    y = x.new_empty((*x.shape[:-1], B.shape[-1]))
    run(launches(None if base is None else rows_of(base), rows_of(x), ids, A, B, scale, y.view(-1, B.shape[-1])))
    return y


# -- operator ------------------------------------------------------------------------------------------------------
def definition(base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`base + scale * x A^T B`, for every sample with the factors of its slot; slot 0 is no adapter.

    base `(..., out)` or None; x `(..., in)`, with ids `(batch, ..., in)` or `(batch * tokens, in)`; ids `(batch,)`
    int64 below K, or None; A `(r, in)`, with ids `(K, r, in)`; B `(r, out)`, with ids `(K, r, out)` -> `(..., out)` in
    x's dtype.
    """
    if ids is None:
        delta = F.linear(F.linear(x, cast(A, x)) * scale, cast(B, x).t())
    else:
        delta = bank_lora(x, ids, A, B * scale if scale != 1 else B)
        delta = torch.where((ids == 0).view(-1, 1, 1), 0, delta.reshape(ids.shape[0], -1, B.shape[-1])).view_as(delta)
    return delta if base is None else base + delta


lora = torch.library.custom_op(
    f"{NAMESPACE}::lora", _launch, mutates_args=(), device_types=("cuda", "cpu"),
    schema="(Tensor? base, Tensor x, Tensor? ids, Tensor A, Tensor B, float scale) -> Tensor",
)  # fmt: skip


@lora.register_fake
def _(base, x, ids, A, B, scale):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], B.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, ids, A, B, ctx.scale = inputs
    ctx.save_for_backward(x, ids, A, B)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    # The gradient of x is the same operator with the factors in each other's place. Those of the factors are plain
    # products over the rows, which cuBLAS does well: ATen. z is made anew: r numbers a row for one more read of x.
    x, ids, A, B = ctx.saved_tensors
    need_base, need_x, _, need_a, need_b, _ = ctx.needs_input_grad
    gx = lora(None, g, ids, B, A, ctx.scale) if need_x else None
    ga = gb = None
    if need_a or need_b:
        samples = 1 if ids is None else ids.shape[0]
        xs, gs = x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, g.shape[-1])
        chosen_a, chosen_b = stacks(ids, A, B) if ids is None else (A.index_select(0, ids), B.index_select(0, ids))
        if need_a:
            gz = torch.bmm(gs, cast(chosen_b, g).transpose(1, 2)) * ctx.scale
            ga = to_stack(torch.bmm(gz.transpose(1, 2), xs), ids, A)
        if need_b:
            z = torch.bmm(xs, cast(chosen_a, x).transpose(1, 2)) * ctx.scale
            gb = to_stack(torch.bmm(z.transpose(1, 2), gs), ids, B)
    return (g if need_base else None), gx, None, ga, gb, None


def to_stack(grads: Tensor, ids: Tensor | None, like: Tensor) -> Tensor:
    """The gradients of the samples' factors, added up by slot; slot 0 is no adapter and gets none."""
    if ids is None:
        return cast(grads.squeeze(0), like)
    grads = torch.where((ids == 0).view(-1, 1, 1), 0, grads)
    return torch.zeros_like(like).index_add(0, ids, cast(grads, like))


lora.register_autograd(_backward, setup_context=_setup)
OPERATOR = torch.ops.fxgraft_kernels.lora.default


# -- lowering ------------------------------------------------------------------------------------------------------
def _measure_bank(arguments: Arguments) -> tuple[int, int, int, int] | None:
    B = value(arguments[3])
    return None if B is None else (int(B.shape[2]), int(B.shape[1]), samples(arguments[1]), B.itemsize)


def _measure_one(arguments: Arguments) -> tuple[int, int, int, int] | None:
    B = value(arguments[2])
    return None if B is None else (int(B.shape[0]), int(B.shape[1]), 1, B.itemsize)


def _forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.samples * s.rank * (s.inner + s.out)
    casts = 2 if s.factor != s.itemsize else 0
    moved = entries * (s.itemsize + (s.itemsize + s.factor if casts else 0))
    return ours(s, rows, entries * s.factor), aten(3 + casts, row_bytes(s, rows, 2) + moved)


def _bank_forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.samples * s.rank * (s.inner + s.out)  # picked out of the stacks and written, then read; z, delta, sum
    moved = entries * (s.factor + 2 * s.itemsize)
    return ours(s, rows, entries * s.factor), aten(5, row_bytes(s, rows, 4) + moved)


def _build_one(graph: fx.Graph, arguments: Arguments) -> Arguments:
    x, A, B, scale = arguments
    return x, None, A, graph.call_function(torch.t, (B,)), scale


register(dialect_lora, Lowering(OPERATOR, _build_one, _measure_one, _forms))
register(
    bank_lora,
    Lowering(
        OPERATOR,
        lambda graph, arguments: (*arguments, 1.0),
        _measure_bank,
        _bank_forms,
        idle=lambda arguments: arguments[1] is None,
        trained=False,
    ),
)
