"""What the positions of a convolution's result see of its input, in plain views and one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def patches_of(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int],
    groups: int, turned: bool,
) -> Tensor:  # fmt: skip
    """x `(..., channels, *spatial)` -> `(..., *positions, [groups,] channels / groups * k...)`.

    Args:
        padding: zeros on both sides of each dimension, or `same` or `valid` as `F.conv2d` takes it.
        turned: the kernel's positions in the opposite order.
    """
    dims = len(kernel)
    pads = _pads(kernel, padding, dilation)
    x = F.pad(x, pads) if any(pads) else x
    for width, step, gap in zip(kernel, stride, dilation, strict=True):
        x = x.unfold(-dims, gap * (width - 1) + 1, step)  # its window comes last: the next dimension stands here now
        x = x[..., ::gap] if gap > 1 else x
    if turned:
        x = x.flip(tuple(range(-dims, 0)))
    x = x.movedim(-2 * dims - 1, -dims - 1)
    if groups > 1:
        x = x.unflatten(-dims - 1, (groups, -1))
    return x.flatten(-dims - 1)


def _pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """As `F.pad` takes them, the last dimension first."""
    if padding == "valid":
        return []
    named = isinstance(padding, str)
    pads: list[int] = []
    for axis in reversed(range(len(kernel))):
        total = dilation[axis] * (kernel[axis] - 1) if named else 2 * int(padding[axis])
        pads += [total // 2, total - total // 2]
    return pads


def upsampled(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:  # fmt: skip
    """The input whose plain convolution with the turned kernel is the transposed one of x: zeros in between, and around
    it."""
    pads: list[int] = []
    for axis in range(-len(kernel), 0):
        around = dilation[axis] * (kernel[axis] - 1) - padding[axis]
        pads = [around, around + output_padding[axis], *pads]
        if (step := stride[axis]) > 1:
            length = (x.shape[axis] - 1) * step + 1
            spread = F.pad(x.movedim(axis, -1).unsqueeze(-1), (0, step - 1)).flatten(-2)
            x = spread.narrow(-1, 0, length).movedim(-1, axis)
    return F.pad(x, pads)
