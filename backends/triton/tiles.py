"""Tile choices of the kernels: from the sizes alone, so that a shape always gives the same program and the same bits.

Not tuned on a GPU: chosen so that nothing spills on sm_80 and sm_90 (`RESOURCES.md`) and a call fills the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: programs a call should have: about two for each multiprocessor of an A100 (108) or H100 (132)
PROGRAMS = 256


@dataclass(frozen=True)
class Tiles:
    """Sizes of one low-rank product's programs.

    Args:
        rows: tokens of a tile, all of one sample.
        rank, inner: of a step of `shrink`; step, out: of one of `expand`, along the rank and the output.
        split: into how many programs the sum over the input is cut; their parts are added in a fixed order.
        warps, stages: of `shrink`, as Triton's.
    """

    rows: int
    rank: int
    inner: int
    step: int
    out: int
    split: int
    warps: int = 4
    stages: int = 3

    def narrowed(self, inner: int = 64, out: int = 64, stages: int = 2) -> Tiles:
        """For factors whose entries take registers to find."""
        return replace(self, inner=min(self.inner, inner), step=16, out=min(self.out, out), stages=stages)


def power_of_two(n: int) -> int:
    """The smallest power of two from n up."""
    return 1 << max(0, n - 1).bit_length()


def low_rank(samples: int, tokens: int, inner: int, out: int, rank: int, itemsize: int) -> Tiles:
    """Tiles for `x (samples, tokens, inner)` down to `rank` and up to `out`; `itemsize` is x's.

    Tensor cores want 16 rows at least; unused ones cost no memory traffic. Float32 products run on the ordinary units,
    whose operands sit in registers, so their tiles are smaller.
    """
    wide = itemsize >= 4
    rows = min(32 if wide else 64, max(16, power_of_two(tokens)))
    r = min(32 if wide else 64, max(16, power_of_two(rank)))
    k = min(32 if wide else 64 if r == 64 else 128, max(16, power_of_two(inner)))
    n = min(64 if wide else 128, max(16, power_of_two(out)))
    programs = samples * -(-tokens // rows) * -(-rank // r)
    steps = -(-inner // k)
    split = 1
    while split < 16 and 2 * split * programs <= PROGRAMS and 4 * split <= steps:
        split *= 2
    return Tiles(rows, r, k, min(r, 32), n, split)
