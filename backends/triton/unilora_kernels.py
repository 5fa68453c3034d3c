"""Uni-LoRA's product, its factors gathered on the way (arXiv 2506.00799, section 3).

An entry of A or B is `theta[i] / sqrt(counts[i])` for its index i. The kernels read the index where a plain product
would read the factor, and fetch the two numbers from the vector, which stays in the cache: no factor is written, and
the vector is not scaled beforehand. Every tile of rows gathers anew, so this pays for few rows; for many the factors
are gathered once (`Share`). The gradient of the vector is one sum by index (`segments.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...passes.graph.products import value
from ...passes.methods.unilora.unilora import all_factors, gather, scale_vector
from ...passes.methods.unilora.unilora import unilora as dialect_unilora
from ...passes.methods.unilora.vector_form import bank_unilora
from ...rewriter.dialect import cast
from .gates import Form, Sizes, aten, ours, row_bytes
from .language import INTERPRETED, jit, precision, runs_on, tl
from .launch import Launch, run
from .lora_kernels import finish, grid_arguments, load_parts, rows_of, sample_tile, samples_of
from .registry import Arguments, Lowering, register, register_shared, samples
from .segments import segment_sum
from .tiles import low_rank


# -- kernels -------------------------------------------------------------------------------------------------------
@jit
def gathered(theta, counts, index, there):
    """The entries of a factor at these places of its index."""
    i = tl.load(index, there, other=0)
    uses = tl.load(counts + i, there, other=1).to(tl.float32)
    return tl.load(theta + i, there, other=0.0).to(tl.float32) * tl.rsqrt(uses)


@jit
def shrink(
    x, ids, theta, counts, index_a, z, tiles, tokens, slots, inner, rank, length, x_row, z_part,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z[split, row, :] = the part of x[row, :] A^T of every SPLIT-th step along the input."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, GROUPED, BLOCK_M)
    part = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if slot >= 0:
        for start in range(part * BLOCK_K, inner, SPLIT * BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xs = tl.load(x + row[:, None] * x_row + k[None, :], live[:, None] & (k < inner)[None, :], other=0.0)
            there = (r < rank)[None, :] & (k < inner)[:, None]
            place = index_a + r[None, :] * inner + k[:, None]
            fs = gathered(theta + slot * length, counts, place, there).to(xs.dtype)
            if WIDE:
                xs, fs = xs.to(tl.float32), fs.to(tl.float32)
            total = tl.dot(xs, fs, total, input_precision=PRECISION)
        there = live[:, None] & (r < rank)[None, :]
        tl.store(z + part * z_part + row[:, None] * rank + r[None, :], total, there)


@jit
def expand(
    base, ids, z, theta, counts, index_b, y, tiles, tokens, slots, rank, out, length, base_row, z_part,
    HAS_BASE: tl.constexpr, GROUPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[row, :] = base[row, :] + z[row, :] B."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, GROUPED, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if slot >= 0:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            there = live[:, None] & (r < rank)[None, :]
            zs = load_parts(z, z_part, row, rank, r, there, SPLIT, BLOCK_M, BLOCK_R).to(y.dtype.element_ty)
            there = (r < rank)[:, None] & (n < out)[None, :]
            fs = gathered(theta + slot * length, counts, index_b + r[:, None] * out + n[None, :], there).to(zs.dtype)
            if WIDE:
                zs, fs = zs.to(tl.float32), fs.to(tl.float32)
            total = tl.dot(zs, fs, total, input_precision=PRECISION)
    finish(base, y, total, row, live, slot, n, out, base_row, HAS_BASE)


# -- launcher ------------------------------------------------------------------------------------------------------
def launches(
    base: Tensor | None, x: Tensor, ids: Tensor | None, theta: Tensor, counts: Tensor, index_a: Tensor,
    index_b: Tensor, y: Tensor,
) -> list[Launch]:  # fmt: skip
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None where theta is one adapter.
        theta: `(K, d)` contiguous, any float dtype. counts: `(d,)` contiguous integers, at least 1.
        index_a: `(r, in)`, index_b: `(r, out)`, contiguous int32 below d.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    rows, inner = x.shape
    rank, out = index_b.shape
    slots, length = theta.shape
    t = low_rank(*samples_of(x, ids), inner, out, rank, x.itemsize)
    z = x.new_empty((t.split, rows, rank), dtype=torch.float32)
    count, common = grid_arguments(x, ids, t, slots)
    shared = {
        "GROUPED": ids is not None, "SPLIT": t.split, "BLOCK_M": t.rows, "PRECISION": precision(),
        "WIDE": INTERPRETED,
    }  # fmt: skip
    vector = {"theta": theta, "counts": counts}
    down = {
        "x": x, "ids": ids, **vector, "index_a": index_a, "z": z, **common, "inner": inner, "rank": rank,
        "length": length, "x_row": x.stride(0), "z_part": rows * rank,
    }  # fmt: skip
    up = {
        "base": base, "ids": ids, "z": z, **vector, "index_b": index_b, "y": y, **common, "rank": rank, "out": out,
        "length": length, "base_row": 0 if base is None else base.stride(0), "z_part": rows * rank,
    }  # fmt: skip
    wide = min(t.out, 64)
    of_shrink = {**shared, "BLOCK_R": t.rank, "BLOCK_K": min(t.inner, 64)}
    of_expand = {**shared, "HAS_BASE": base is not None, "BLOCK_R": 16, "BLOCK_N": wide}
    return [
        Launch(shrink, (count, -(-rank // t.rank), t.split), down, of_shrink, t.warps, 2),
        Launch(expand, (count, -(-out // wide)), up, of_expand, t.warps, 2),
    ]


def _launch(
    base: Tensor | None, x: Tensor, ids: Tensor | None, theta: Tensor, counts: Tensor, index_a: Tensor, index_b: Tensor
) -> Tensor:
    if not runs_on(x) or theta.device != x.device:  # a model spread over devices: the vector lives on the first
        return definition(base, x, ids, theta, counts, index_a, index_b).contiguous()  # as the kernel's
    out = index_b.shape[1]
    y = x.new_empty((*x.shape[:-1], out))
    table = theta if ids is not None else theta.unsqueeze(0)
    vector = table.contiguous(), counts.contiguous()
    indices = index_a.contiguous(), index_b.contiguous()
    run(launches(None if base is None else rows_of(base), rows_of(x), ids, *vector, *indices, y.view(-1, out)))
    return y


# -- operator ------------------------------------------------------------------------------------------------------
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
        delta = bank_unilora(x, ids, theta, counts, index_a, index_b)
        apart = delta.reshape(ids.shape[0], -1, delta.shape[-1])
        delta = torch.where((ids == 0).to(x.device).view(-1, 1, 1), 0, apart).view_as(delta)
    return delta if base is None else base + delta


unilora = torch.library.custom_op(
    "fxgraft_kernels::unilora", _launch, mutates_args=(), device_types=("cuda", "cpu"),
    schema=(
        "(Tensor? base, Tensor x, Tensor? ids, Tensor theta, Tensor counts, Tensor index_a, Tensor index_b) -> Tensor"
    ),
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.unilora.default


@unilora.register_fake
def _(base, x, ids, theta, counts, index_a, index_b):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], index_b.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    # The gradient of x is the same operator with the indices in each other's place. Those of the virtual factors are
    # plain products over the rows, which cuBLAS does well: ATen, on factors gathered for the moment.
    x, ids, theta, counts, index_a, index_b = ctx.saved_tensors
    need_base, need_x, _, need_theta = ctx.needs_input_grad[:4]
    gx = unilora(None, g, ids, theta, counts, index_b, index_a) if need_x else None
    gtheta = None
    if need_theta:
        one = theta if ids is None else theta.index_select(0, ids)  # (d,) or (samples, d)
        rate = counts.to(theta.dtype).rsqrt()
        table = (one * rate).view(-1, counts.shape[0]).to(x.device)
        A, B = (table.index_select(1, i.flatten()).view(-1, *i.shape) for i in (index_a, index_b))
        xs, gs = x.reshape(A.shape[0], -1, x.shape[-1]), g.reshape(A.shape[0], -1, g.shape[-1])
        gz, z = torch.bmm(gs, cast(B, g).transpose(1, 2)), torch.bmm(xs, cast(A, x).transpose(1, 2))
        parts = torch.bmm(gz.transpose(1, 2), xs).flatten(1), torch.bmm(z.transpose(1, 2), gs).flatten(1)
        values = torch.cat(parts, 1).to(theta)
        index = torch.cat([index_a.flatten(), index_b.flatten()]).to(theta.device)
        if ids is None:
            gtheta = segment_sum(values[0], index, theta.shape[0]) * rate
        else:  # a bank's vectors are frozen: rare, and not worth a kernel
            by_slot = torch.where((ids == 0).view(-1, 1), 0, values)
            gtheta = torch.zeros_like(theta).index_put((ids[:, None], index.long()[None]), by_slot, True) * rate
    return (g if need_base else None), gx, None, gtheta, None, None, None


unilora.register_autograd(_backward, setup_context=_setup)


class _GatherAll(torch.autograd.Function):
    """All factors of all sites; their gradients go back to the vector in one sum of the same bits every run."""

    @staticmethod
    def forward(ctx, scaled, *indices):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(*indices)
        ctx.length = scaled.shape[0]
        return tuple(gather(scaled.to(index.device), index) for index in indices)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def, override]
        first = grads[0]
        values = torch.cat([g.to(first.device).flatten() for g in grads])
        index = torch.cat([i.to(first.device).flatten() for i in ctx.saved_tensors])
        return segment_sum(values, index, ctx.length), *(None for _ in grads)


def summed_factors(theta: Tensor, counts: Tensor, indices: list[Tensor]) -> tuple[Tensor, ...]:
    """`all_factors` with the kernel's sum on the way back."""
    return _GatherAll.apply(scale_vector(theta, counts), *indices)  # type: ignore[return-value, no-untyped-call]


register_shared(all_factors, summed_factors)


# -- lowering ------------------------------------------------------------------------------------------------------
def _measure(arguments: Arguments, ids: Any, theta: Any) -> tuple[int, int, int, int] | None:
    index_b, vector = value(arguments[-1]), value(theta)
    if index_b is None or vector is None:
        return None
    return int(index_b.shape[1]), int(index_b.shape[0]), 1 if ids is None else samples(ids), vector.itemsize


_INDEX, _L2 = 4, 0.3  # bytes of an index; what a byte from the cache costs of one from memory


def _forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.rank * (s.inner + s.out)
    again = max(s.samples, -(-rows // 64)) - 1  # tiles that gather anew, from the cache
    gathers = entries * (_INDEX + again * (_INDEX + s.factor) * _L2)
    made = s.samples * entries * (2 * s.itemsize) + entries * _INDEX  # factors written and read; z, then the sum
    return ours(s, rows, gathers), aten(4, row_bytes(s, rows, 2 if s.samples == 1 else 4) + made)


register(
    dialect_unilora,
    Lowering(
        OPERATOR,
        lambda graph, arguments: (arguments[0], None, *arguments[1:]),
        lambda arguments: _measure(arguments, None, arguments[1]),
        _forms,
    ),
)
register(
    bank_unilora,
    Lowering(
        OPERATOR,
        lambda graph, arguments: arguments,
        lambda arguments: _measure(arguments, arguments[1], arguments[2]),
        _forms,
        idle=lambda arguments: arguments[1] is None,
        trained=False,
    ),
)
