"""HydraLoRA's route-and-combine in two kernels (arXiv 2404.19245, section 3.2), and the bank of such adapters.

`shrink` reads x once for A and the router, whose rows follow one another in z; `expand` makes the softmax of a tile's
logits, forms the numbers `w_i z_j` of all experts in registers and multiplies them by the experts' B, one under the
other: neither the weights nor the mixed numbers are written. The gates' exponents are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...passes.graph.products import value
from ...passes.methods.hydralora.hydralora import hydralora as dialect_hydralora
from ...passes.methods.hydralora.routed_form import bank_hydralora
from ...rewriter.dialect import cast
from .gates import Form, Sizes, aten, ours, row_bytes
from .language import INTERPRETED, jit, precision, runs_on, tl
from .launch import Launch, run
from .lora_kernels import finish, grid_arguments, load_parts, rows_of, sample_tile, samples_of, stacks, to_stack
from .registry import Arguments, Lowering, register, samples
from .tiles import low_rank, power_of_two


# -- kernels -------------------------------------------------------------------------------------------------------
@jit
def shrink(
    x, ids, a, router, z, tiles, tokens, slots, inner, rank, experts, x_row, z_part,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z[split, row, :] = the part of x[row, :] [A; router]^T of every SPLIT-th step along the input."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, GROUPED, BLOCK_M)
    part = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    both = rank + experts
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if slot >= 0:
        for start in range(part * BLOCK_K, inner, SPLIT * BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xs = tl.load(x + row[:, None] * x_row + k[None, :], live[:, None] & (k < inner)[None, :], other=0.0)
            of_a = a + (slot * rank + r[None, :]) * inner + k[:, None]
            of_router = router + (slot * experts + r[None, :] - rank) * inner + k[:, None]
            place = tl.where((r < rank)[None, :], of_a, of_router)
            fs = tl.load(place, (r < both)[None, :] & (k < inner)[:, None], other=0.0).to(xs.dtype)
            if WIDE:
                xs, fs = xs.to(tl.float32), fs.to(tl.float32)
            total = tl.dot(xs, fs, total, input_precision=PRECISION)
        there = live[:, None] & (r < both)[None, :]
        tl.store(z + part * z_part + row[:, None] * both + r[None, :], total, there)


@jit
def expand(
    base, ids, z, b, y, tiles, tokens, slots, rank, experts, out, scale, base_row, z_part,
    HAS_BASE: tl.constexpr, GROUPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[row, :] = base[row, :] + scale * sum over i of softmax(logits[row, :])_i * z[row, :] B_i."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, GROUPED, BLOCK_M)
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
            factor = b + (slot * mixed + p[:, None]) * out + n[None, :]
            fs = tl.load(factor, (p < mixed)[:, None] & (n < out)[None, :], other=0.0).to(ms.dtype)
            if WIDE:
                ms, fs = ms.to(tl.float32), fs.to(tl.float32)
            total = tl.dot(ms, fs, total, input_precision=PRECISION)
    finish(base, y, total, row, live, slot, n, out, base_row, HAS_BASE)


# -- launcher ------------------------------------------------------------------------------------------------------
def launches(
    base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, router: Tensor, B: Tensor, scale: float, y: Tensor
) -> list[Launch]:
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None where the tensors are one adapter.
        A: `(K, r, in)`, router: `(K, N, in)`, contiguous, of one float dtype. B: `(K, N * r, out)`, contiguous.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    rows, inner = x.shape
    slots, rank, experts, out = B.shape[0], A.shape[1], router.shape[1], B.shape[2]
    both = rank + experts
    t = low_rank(*samples_of(x, ids), inner, out, both, x.itemsize)
    z = x.new_empty((t.split, rows, both), dtype=torch.float32)
    count, common = grid_arguments(x, ids, t, slots)
    sizes = {"rank": rank, "experts": experts}
    shared = {
        "GROUPED": ids is not None, "SPLIT": t.split, "BLOCK_M": t.rows, "PRECISION": precision(),
        "WIDE": INTERPRETED,
    }  # fmt: skip
    down = {
        "x": x, "ids": ids, "a": A, "router": router, "z": z, **common, "inner": inner, **sizes, "x_row": x.stride(0),
        "z_part": rows * both,
    }  # fmt: skip
    up = {
        "base": base, "ids": ids, "z": z, "b": B, "y": y, **common, **sizes, "out": out, "scale": scale,
        "base_row": 0 if base is None else base.stride(0), "z_part": rows * both,
    }  # fmt: skip
    wide = min(t.out, 64)
    of_shrink = {**shared, "BLOCK_R": t.rank, "BLOCK_K": min(t.inner, 64)}
    of_expand = {
        **shared, "HAS_BASE": base is not None, "BLOCK_R": 16, "BLOCK_N": wide,
        "BLOCK_E": max(16, power_of_two(experts)),
    }  # fmt: skip
    return [
        Launch(shrink, (count, -(-both // t.rank), t.split), down, of_shrink, t.warps, t.stages),
        Launch(expand, (count, -(-out // wide)), up, of_expand, 8, 2),
    ]


def _launch(
    base: Tensor | None, x: Tensor, ids: Tensor | None, A: Tensor, router: Tensor, B: Tensor, scale: float
) -> Tensor:
    if not runs_on(x):
        return definition(base, x, ids, A, router, B, scale).contiguous()  # as the kernel's
    A, router, B = (t.contiguous() for t in stacks(ids, A, cast(router, A), B))
    out = B.shape[-1]
    y = x.new_empty((*x.shape[:-1], out))
    tensors = A, router, B.view(B.shape[0], -1, out)
    run(launches(None if base is None else rows_of(base), rows_of(x), ids, *tensors, scale, y.view(-1, out)))
    return y


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
        delta = bank_hydralora(x, ids, A, router, B * scale if scale != 1 else B)
        apart = delta.reshape(ids.shape[0], -1, delta.shape[-1])
        delta = torch.where((ids == 0).view(-1, 1, 1), 0, apart).view_as(delta)
    return delta if base is None else base + delta


hydralora = torch.library.custom_op(
    "fxgraft_kernels::hydralora", _launch, mutates_args=(), device_types=("cuda", "cpu"),
    schema="(Tensor? base, Tensor x, Tensor? ids, Tensor A, Tensor router, Tensor B, float scale) -> Tensor",
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.hydralora.default


@hydralora.register_fake
def _(base, x, ids, A, router, B, scale):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], B.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    # Five products over all rows and a softmax's few numbers between them, which the compiler fuses: ATen.
    x, ids, A, router, B = ctx.saved_tensors
    out = B.shape[-1]
    one = stacks(ids, A, router, B) if ids is None else tuple(t.index_select(0, ids) for t in (A, router, B))
    a, gate, b = (cast(t, x) for t in one)
    samples, rank, experts = a.shape[0], a.shape[1], gate.shape[1]
    b = b.reshape(samples, -1, out)
    xs, gs = x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, out)
    z = torch.bmm(xs, a.transpose(1, 2))
    w = torch.bmm(xs, gate.transpose(1, 2)).softmax(-1, dtype=torch.float32)
    mixed = (w.unsqueeze(-1) * z.unsqueeze(-2) * ctx.scale).flatten(-2).to(x.dtype)
    gm = torch.bmm(gs, b.transpose(1, 2)).unflatten(-1, (experts, rank)).float() * ctx.scale
    gz = (w.unsqueeze(-1) * gm).sum(-2).to(x.dtype)
    gw = (gm * z.unsqueeze(-2)).sum(-1)
    gl = (w * (gw - (w * gw).sum(-1, keepdim=True))).to(x.dtype)
    need_base, need_x, _, need_a, need_router, need_b, _ = ctx.needs_input_grad
    gx = ga = grouter = gb = None
    if need_x:
        gx = torch.bmm(gz, a) + torch.bmm(gl, gate)
        gx = (gx if ids is None else torch.where((ids == 0).view(-1, 1, 1), 0, gx)).reshape(x.shape)
    if need_a:
        ga = to_stack(torch.bmm(gz.transpose(1, 2), xs), ids, A)
    if need_router:
        grouter = to_stack(torch.bmm(gl.transpose(1, 2), xs), ids, router)
    if need_b:
        experts_as_rows = B if ids is None else B.flatten(1, 2)
        gb = to_stack(torch.bmm(mixed.transpose(1, 2), gs), ids, experts_as_rows).view(B.shape)
    return (g if need_base else None), gx, None, ga, grouter, gb, None


hydralora.register_autograd(_backward, setup_context=_setup)


# -- lowering ------------------------------------------------------------------------------------------------------
def _measure_one(arguments: Arguments) -> tuple[int, int, int, int] | None:
    B, A = value(arguments[4]), value(arguments[2])
    return None if A is None or B is None else (int(B.shape[1]), int(A.shape[0]), 1, B.itemsize)


def _measure_bank(arguments: Arguments) -> tuple[int, int, int, int] | None:
    B = value(arguments[4])
    if B is None:
        return None
    return int(B.shape[3]), int(B.shape[2]), samples(arguments[1]), B.itemsize


_EXPERTS = 4  # what the cost rule takes for the number of experts: 2 to 4 are usual


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
    Lowering(
        OPERATOR,
        lambda graph, arguments: (arguments[0], None, *arguments[2:]),
        _measure_one,
        _forms,
        refuse=_two_inputs,
    ),
)
register(
    bank_hydralora,
    Lowering(
        OPERATOR,
        lambda graph, arguments: (*arguments, 1.0),
        _measure_bank,
        _bank_forms,
        idle=lambda arguments: arguments[1] is None,
        trained=False,
    ),
)
