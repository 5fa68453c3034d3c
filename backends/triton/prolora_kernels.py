"""PRoLoRA on its chunks: the rotated copies are addresses, not memory (arXiv 2402.16902, section 3.2).

Entry (j, i) of an expanded factor lies in copy `k = i // c` of the chunk `(q, c)`, row `(j + k * stride) mod q`, column
`i mod c`; rows from q up are the unshared ranks'. The kernels compute that place where a plain product would step
along the row. Both factors are taken `(rank, long side)`, so the product and the gradient of its input are one
operator with the factors in each other's place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...passes.graph.products import value
from ...passes.methods.prolora import expand as expanded
from ...passes.methods.prolora import prolora as dialect_prolora
from ...rewriter.dialect import cast
from .gates import Form, Sizes, aten, ours, row_bytes
from .language import INTERPRETED, jit, precision, runs_on, tl
from .launch import Launch, run
from .lora_kernels import finish, grid_arguments, load_parts, rows_of, sample_tile
from .registry import Arguments, Lowering, register
from .tiles import low_rank


# -- kernels -------------------------------------------------------------------------------------------------------
@jit
def rotated(
    shared, unshared, j, i, there, ranks, turn, width, shared_rank, shared_long, unshared_rank, unshared_long,
    SHARED: tl.constexpr, UNSHARED: tl.constexpr,
):  # fmt: skip
    """Entries (j, i) of an expanded factor."""
    place = unshared + (j - ranks) * unshared_rank + i * unshared_long if UNSHARED else shared
    if SHARED:
        row = j + (i // width * turn) % ranks
        row = tl.where(row >= ranks, row - ranks, row)
        chunk = shared + row * shared_rank + (i % width) * shared_long
        place = tl.where(j < ranks, chunk, place) if UNSHARED else chunk
    return tl.load(place, there, other=0.0)


@jit
def shrink(
    x, shared, unshared, z, tiles, tokens, inner, rank, ranks, turn, width, x_row, shared_rank, shared_long,
    unshared_rank, unshared_long, z_part,
    SHARED: tl.constexpr, UNSHARED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z[split, row, :] = the part of x[row, :] A^T of every SPLIT-th step along the input."""
    row, live, _ = sample_tile(None, tl.program_id(0), tiles, tokens, 1, False, BLOCK_M)
    part = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(part * BLOCK_K, inner, SPLIT * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        xs = tl.load(x + row[:, None] * x_row + k[None, :], live[:, None] & (k < inner)[None, :], other=0.0)
        there = (r < rank)[None, :] & (k < inner)[:, None]
        fs = rotated(
            shared, unshared, r[None, :], k[:, None], there, ranks, turn, width, shared_rank, shared_long,
            unshared_rank, unshared_long, SHARED, UNSHARED,
        ).to(xs.dtype)  # fmt: skip
        if WIDE:
            xs, fs = xs.to(tl.float32), fs.to(tl.float32)
        total = tl.dot(xs, fs, total, input_precision=PRECISION)
    there = live[:, None] & (r < rank)[None, :]
    tl.store(z + part * z_part + row[:, None] * rank + r[None, :], total, there)


@jit
def expand(
    base, z, shared, unshared, y, tiles, tokens, rank, out, scale, ranks, turn, width, base_row, shared_rank,
    shared_long, unshared_rank, unshared_long, z_part,
    SHARED: tl.constexpr, UNSHARED: tl.constexpr, HAS_BASE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[row, :] = base[row, :] + scale * z[row, :] B."""
    row, live, slot = sample_tile(None, tl.program_id(0), tiles, tokens, 1, False, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        there = live[:, None] & (r < rank)[None, :]
        zs = load_parts(z, z_part, row, rank, r, there, SPLIT, BLOCK_M, BLOCK_R) * scale
        zs = zs.to(y.dtype.element_ty)
        there = (r < rank)[:, None] & (n < out)[None, :]
        fs = rotated(
            shared, unshared, r[:, None], n[None, :], there, ranks, turn, width, shared_rank, shared_long,
            unshared_rank, unshared_long, SHARED, UNSHARED,
        ).to(zs.dtype)  # fmt: skip
        if WIDE:
            zs, fs = zs.to(tl.float32), fs.to(tl.float32)
        total = tl.dot(zs, fs, total, input_precision=PRECISION)
    finish(base, y, total, row, live, slot, n, out, base_row, HAS_BASE)


# -- launcher ------------------------------------------------------------------------------------------------------
def _side(shared: Tensor | None, unshared: Tensor | None, chunks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kernel is told of one factor: arguments and constants."""
    ranks = 0 if shared is None else shared.shape[0]
    arguments = {
        "shared": shared, "unshared": unshared, "ranks": ranks, "turn": max(ranks // chunks, 1),
        "width": 1 if shared is None else shared.shape[1],
        "shared_rank": 0 if shared is None else shared.stride(0),
        "shared_long": 0 if shared is None else shared.stride(1),
        "unshared_rank": 0 if unshared is None else unshared.stride(0),
        "unshared_long": 0 if unshared is None else unshared.stride(1),
    }  # fmt: skip
    return arguments, {"SHARED": shared is not None, "UNSHARED": unshared is not None}


def launches(
    base: Tensor | None, x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None,
    B_unshared: Tensor | None, a_chunks: int, b_chunks: int, scale: float, y: Tensor,
) -> list[Launch]:  # fmt: skip
    """The two calls.

    Args:
        base: `(rows, out)` or None, features one after the other.
        x: `(rows, in)`, features one after the other.
        A_shared: `(q, ceil(in / a_chunks))`, A_unshared: `(u, in)`, B_shared: `(q, ceil(out / b_chunks))`, B_unshared:
            `(u, out)`; any strides, None where there are no such ranks; both of a factor in one float dtype.
        y: `(rows, out)` contiguous, in x's dtype; written.
    """
    (rows, inner), out = x.shape, y.shape[1]
    rank = sum(t.shape[0] for t in (A_shared, A_unshared) if t is not None)
    t = low_rank(1, rows, inner, out, rank, x.itemsize)
    z = x.new_empty((t.split, rows, rank), dtype=torch.float32)
    count, common = grid_arguments(x, None, t, 1)
    del common["slots"]
    constants = {"SPLIT": t.split, "BLOCK_M": t.rows, "PRECISION": precision(), "WIDE": INTERPRETED}
    of_a, kinds = _side(A_shared, A_unshared, a_chunks)
    of_b, _ = _side(B_shared, B_unshared, b_chunks)
    down = {"x": x, "z": z, **common, "inner": inner, "rank": rank, "x_row": x.stride(0), **of_a, "z_part": rows * rank}
    up = {
        "base": base, "z": z, "y": y, **common, "rank": rank, "out": out, "scale": scale,
        "base_row": 0 if base is None else base.stride(0), **of_b, "z_part": rows * rank,
    }  # fmt: skip
    wide = min(t.out, 32 if x.itemsize >= 4 else 64)
    of_shrink = {**constants, **kinds, "BLOCK_R": t.rank, "BLOCK_K": min(t.inner, 64)}
    of_expand = {**constants, **kinds, "HAS_BASE": base is not None, "BLOCK_R": 16, "BLOCK_N": wide}
    return [
        Launch(shrink, (count, -(-rank // t.rank), t.split), down, of_shrink, t.warps, 2),
        Launch(expand, (count, -(-out // wide)), up, of_expand, t.warps, 2),
    ]


def _launch(
    base: Tensor | None, x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None,
    B_unshared: Tensor | None, a_chunks: int, b_chunks: int, out_features: int, scale: float,
) -> Tensor:  # fmt: skip
    if not runs_on(x):
        factors = A_shared, A_unshared, B_shared, B_unshared
        return definition(base, x, *factors, a_chunks, b_chunks, out_features, scale).contiguous()  # as the kernel's
    if A_shared is not None and A_unshared is not None and B_shared is not None and B_unshared is not None:
        A_unshared, B_unshared = cast(A_unshared, A_shared), cast(B_unshared, B_shared)
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = None if base is None else rows_of(base)
    factors = A_shared, A_unshared, B_shared, B_unshared
    run(launches(rows, rows_of(x), *factors, a_chunks, b_chunks, scale, y.view(-1, out_features)))
    return y


# -- operator ------------------------------------------------------------------------------------------------------
def _rows(shared: Tensor, chunks: int, back: bool = False) -> Tensor:
    """`(q, chunks)`: the chunk's row that copy k puts into row j; `back`: the row of copy k that chunk row j is in."""
    ranks = shared.shape[0]
    turn = max(ranks // chunks, 1) * torch.arange(chunks, device=shared.device)
    return (torch.arange(ranks, device=shared.device)[:, None] + (-turn if back else turn)) % ranks


def _factor(shared: Tensor | None, unshared: Tensor | None, chunks: int, length: int) -> Tensor:
    """The factor in full, `(r, length)`, shared ranks first."""
    parts = [] if shared is None else [expanded(shared, _rows(shared, chunks), length)]
    return torch.cat([*parts, *([] if unshared is None else [unshared])])


def _to_chunks(grad: Tensor, shared: Tensor | None, unshared: Tensor | None, chunks: int) -> list[Tensor | None]:
    """The gradients of both parts from that of the full factor `(r, length)`."""
    if shared is None or unshared is None:
        split = grad, grad
    else:
        split = grad.split([shared.shape[0], unshared.shape[0]])  # type: ignore[assignment]
    of_shared = None
    if shared is not None:
        whole = F.pad(split[0], (0, chunks * shared.shape[1] - grad.shape[1])).unflatten(1, (chunks, -1))
        copies = whole[_rows(shared, chunks, back=True), torch.arange(chunks, device=grad.device)]
        of_shared = cast(copies.sum(1), shared)
    return [of_shared, None if unshared is None else cast(split[1], unshared)]


def definition(
    base: Tensor | None, x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None,
    B_unshared: Tensor | None, a_chunks: int, b_chunks: int, out_features: int, scale: float,
) -> Tensor:  # fmt: skip
    """`base + scale * x A^T B` with A `(r, in)` and B `(r, out)` expanded from their chunks.

    base `(..., out)` or None; x `(..., in)`; A_shared `(q, ceil(in / a_chunks))`, A_unshared `(u, in)`, B_shared
    `(q, ceil(out / b_chunks))`, B_unshared `(u, out)`, None where there are no such ranks -> `(..., out)` in x's dtype.
    """
    A = _factor(A_shared, A_unshared, a_chunks, x.shape[-1])
    B = _factor(B_shared, B_unshared, b_chunks, out_features)
    delta = F.linear(F.linear(x, cast(A, x)) * scale, cast(B, x).t())
    return delta if base is None else base + delta


prolora = torch.library.custom_op(
    "fxgraft_kernels::prolora", _launch, mutates_args=(), device_types=("cuda", "cpu"),
    schema=(
        "(Tensor? base, Tensor x, Tensor? A_shared, Tensor? A_unshared, Tensor? B_shared, Tensor? B_unshared, "
        "int a_chunks, int b_chunks, SymInt out_features, float scale) -> Tensor"
    ),
)  # fmt: skip
OPERATOR = torch.ops.fxgraft_kernels.prolora.default


@prolora.register_fake
def _(base, x, A_shared, A_unshared, B_shared, B_unshared, a_chunks, b_chunks, out_features, scale):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.a_chunks, ctx.b_chunks, ctx.out, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    # The gradient of x is the same operator with the factors in each other's place. Those of the factors are plain
    # products over the rows, which cuBLAS does well, and a sum over the copies: ATen, factors expanded for the moment.
    x, *factors = ctx.saved_tensors
    A_shared, A_unshared, B_shared, B_unshared = factors
    need_base, need_x, *need = ctx.needs_input_grad[:6]
    a, b, inner = ctx.a_chunks, ctx.b_chunks, x.shape[-1]
    gx = ga = gb = None
    if need_x:
        gx = prolora(None, g, B_shared, B_unshared, A_shared, A_unshared, b, a, inner, ctx.scale)
    xs, gs = x.reshape(-1, inner), g.reshape(-1, ctx.out)
    if need[0] or need[1]:
        gz = gs @ cast(_factor(B_shared, B_unshared, b, ctx.out), g).t() * ctx.scale
        ga = _to_chunks(gz.t() @ xs, A_shared, A_unshared, a)
    if need[2] or need[3]:
        z = xs @ cast(_factor(A_shared, A_unshared, a, inner), x).t() * ctx.scale
        gb = _to_chunks(z.t() @ gs, B_shared, B_unshared, b)
    return (g if need_base else None), gx, *(ga or [None, None]), *(gb or [None, None]), None, None, None, None


prolora.register_autograd(_backward, setup_context=_setup)


# -- lowering ------------------------------------------------------------------------------------------------------
def _chunks(rows: Any) -> int:
    found = value(rows)
    return 1 if found is None else int(found.shape[1])


def _unknown(arguments: Arguments) -> str | None:
    unknown = any(rows is not None and value(rows) is None for rows in arguments[5:7])
    return "nothing is known of its chunks" if unknown else None


def _build(graph: fx.Graph, arguments: Arguments) -> Arguments:
    x, A_shared, A_unshared, B_shared, B_unshared, rows_a, rows_b, _, out, scale = arguments
    turned = [None if t is None else graph.call_function(torch.t, (t,)) for t in (B_shared, B_unshared)]
    return x, A_shared, A_unshared, *turned, _chunks(rows_a), _chunks(rows_b), out, scale


def _measure(arguments: Arguments) -> tuple[int, int, int, int] | None:
    kinds = [found for t in arguments[1:3] if (found := value(t)) is not None]
    if not kinds:
        return None
    return int(arguments[8]), sum(int(t.shape[0]) for t in kinds), 1, kinds[0].itemsize


def _forms(s: Sizes, rows: int) -> tuple[Form, Form]:
    entries = s.rank * (s.inner + s.out)
    chunks = entries // 4 * s.factor  # at least four copies are usual
    return ours(s, rows, chunks), aten(5, row_bytes(s, rows, 2) + chunks + 2 * entries * s.itemsize)


register(dialect_prolora, Lowering(OPERATOR, _build, _measure, _forms, refuse=_unknown))
