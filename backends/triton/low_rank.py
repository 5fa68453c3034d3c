"""The low-rank product of the kernels, `y = base + scale * (x A^T) B`, of factors that say how they are read.

Two kernels: `shrink` makes `z = x A^T`, cut along the input where there are few rows, its parts in float32; `expand`
adds the parts in a fixed order (no atomics: the same bits every run), multiplies by B and adds the base's output on
the way. A factor is a tuple and the device function that reads it:

    READ(factor, slot, r, i, there)   ->   its entries (r, i), r along the rank and i along the long side

The operation is Punica's SGMV (Chen et al., arXiv 2310.18547, section 4), for samples instead of sorted segments: a
tile holds tokens of one sample, so the ids are read as they are and nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import Launch
from .optional_triton import INTERPRETED, jit, precision, tl
from .tiles import Tiles


# -- device functions ----------------------------------------------------------------------------------------------
@jit
def sample_tile(ids, tile, tiles, tokens, slots, BLOCK_M: tl.constexpr):
    """Of a tile of tokens: their rows in x, which of them exist, and the slot, -1 for none and -2 for a wrong id."""
    sample = tile // tiles
    token = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = sample.to(tl.int64) * tokens + token
    slot = tl.zeros((), tl.int64)
    if ids is not None:
        slot = tl.load(ids + sample).to(tl.int64)
        slot = tl.where((slot < 0) | (slot >= slots), -2, tl.where(slot == 0, -1, slot))
    return row, token < tokens, slot


@jit
def add_product(left, right, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """total + left @ right, right in left's dtype."""
    right = right.to(left.dtype)
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


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
def finish(base, y, total, row, live, slot, n, out, base_row):
    """y[row, n] = base[row, n] + total; NaN where the id was wrong: loud, and nothing outside was read."""
    there = live[:, None] & (n < out)[None, :]
    total = tl.where(slot == -2, float("nan"), total)
    if base is not None:
        total += tl.load(base + row[:, None] * base_row + n[None, :], there, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * out + n[None, :], total.to(y.dtype.element_ty), there)


@jit
def read_strided(factor, slot, r, i, there):
    """The reader of a plain stack `(slots, rank, long side)` of any strides: (entries, slot's, rank's, long's)."""
    entries, of_slot, of_rank, of_long = factor
    return tl.load(entries + slot * of_slot + r * of_rank + i * of_long, there, other=0.0)


# -- kernels -------------------------------------------------------------------------------------------------------
@jit
def shrink(
    x, ids, factor, z, tiles, tokens, slots, inner, rank, x_row, z_part,
    READ: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """z[split, row, :] = the part of x[row, :] A[slot]^T of every SPLIT-th step along the input."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, BLOCK_M)
    part = tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if slot >= 0:
        for start in range(part * BLOCK_K, inner, SPLIT * BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xs = tl.load(x + row[:, None] * x_row + k[None, :], live[:, None] & (k < inner)[None, :], other=0.0)
            fs = READ(factor, slot, r[None, :], k[:, None], (r < rank)[None, :] & (k < inner)[:, None])
            total = add_product(xs, fs, total, PRECISION, WIDE)
        there = live[:, None] & (r < rank)[None, :]
        tl.store(z + part * z_part + row[:, None] * rank + r[None, :], total, there)


@jit
def expand(
    base, ids, z, factor, y, tiles, tokens, slots, rank, out, scale, base_row, z_part,
    READ: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[row, :] = base[row, :] + scale * z[row, :] B[slot]."""
    row, live, slot = sample_tile(ids, tl.program_id(0), tiles, tokens, slots, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if slot >= 0:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            there = live[:, None] & (r < rank)[None, :]
            zs = load_parts(z, z_part, row, rank, r, there, SPLIT, BLOCK_M, BLOCK_R) * scale
            zs = zs.to(y.dtype.element_ty)
            fs = READ(factor, slot, r[:, None], n[None, :], (r < rank)[:, None] & (n < out)[None, :])
            total = add_product(zs, fs, total, PRECISION, WIDE)
    finish(base, y, total, row, live, slot, n, out, base_row)


# -- launches ------------------------------------------------------------------------------------------------------
def samples_of(x: Tensor, ids: Tensor | None) -> tuple[int, int]:
    """How many samples the rows `(rows, features)` are, and of how many tokens each."""
    return (1, x.shape[0]) if ids is None else (ids.shape[0], x.shape[0] // max(1, ids.shape[0]))


def _grid(x: Tensor, ids: Tensor | None, slots: int, t: Tiles) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """How many tiles of tokens there are, and what both kernels are told: arguments and constants."""
    samples, tokens = samples_of(x, ids)
    per_sample = -(-tokens // t.rows)
    constants = {"SPLIT": t.split, "BLOCK_M": t.rows, "PRECISION": precision(), "WIDE": INTERPRETED}
    return samples * per_sample, {"tiles": per_sample, "tokens": tokens, "slots": slots}, constants


def down(
    x: Tensor, ids: Tensor | None, slots: int, read: Any, factor: tuple[Any, ...], rank: int, t: Tiles
) -> tuple[Launch, Tensor]:
    """The call of `shrink`, and the z `(split, rows, rank)` it writes.

    Args:
        x: `(rows, in)`, features one after the other; with ids, rows of a sample follow one another.
        ids: `(samples,)` integers, or None where all rows have slot 0 of a factor's one slot.
        read, factor: A, `rank` by `in`.
    """
    rows, inner = x.shape
    z = x.new_empty((t.split, rows, rank), dtype=torch.float32)
    count, sizes, constants = _grid(x, ids, slots, t)
    arguments = {
        "x": x, "ids": ids, "factor": factor, "z": z, **sizes, "inner": inner, "rank": rank, "x_row": x.stride(0),
        "z_part": rows * rank,
    }  # fmt: skip
    constants |= {"READ": read, "BLOCK_R": t.rank, "BLOCK_K": t.inner}
    return Launch(shrink, (count, -(-rank // t.rank), t.split), arguments, constants, t.warps, t.stages), z


def up(
    base: Tensor | None, ids: Tensor | None, slots: int, z: Tensor, factor: tuple[Any, ...], rank: int, scale: float,
    y: Tensor, t: Tiles, constants: dict[str, Any], kernel: Any = expand, warps: int = 4,
) -> Launch:  # fmt: skip
    """The call of `expand`, or of a kernel in its place.

    Args:
        base: `(rows, out)` or None, features one after the other.
        ids: as `down` has them. z: what it wrote.
        factor: B, `rank` by `out`. y: `(rows, out)` contiguous; written.
        constants: READ, or what the other kernel has instead.
    """
    count, sizes, shared = _grid(y, ids, slots, t)
    out = y.shape[1]
    arguments = {
        "base": base, "ids": ids, "z": z, "factor": factor, "y": y, **sizes, "rank": rank, "out": out, "scale": scale,
        "base_row": 0 if base is None else base.stride(0), "z_part": z.stride(0),
    }  # fmt: skip
    constants = {**shared, **constants, "BLOCK_R": t.step, "BLOCK_N": t.out}
    return Launch(kernel, (count, -(-out // t.out)), arguments, constants, warps, 2)


def product(
    base: Tensor | None, x: Tensor, ids: Tensor | None, slots: int, read: Any, A: tuple[Any, ...], B: tuple[Any, ...],
    rank: int, scale: float, y: Tensor, t: Tiles,
) -> list[Launch]:  # fmt: skip
    """Both calls, where one function reads both factors; arguments as `down` and `up` have them."""
    first, z = down(x, ids, slots, read, A, rank, t)
    return [first, up(base, ids, slots, z, B, rank, scale, y, t, {"READ": read})]
