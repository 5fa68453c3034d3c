"""Attention within windows of a picture, every second time shifted by half of one: what lies between Swin's products.

Liu et al., "Swin Transformer" (arXiv 2103.14030, section 3.2) and "Swin Transformer V2" (arXiv 2111.09883, 3.3), with
torchvision's conventions: a picture is padded to whole windows, and is not shifted along a side that one window fills.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_APART = -100.0  # added to the score of two positions that only the shift has brought together


def _padded(x: Tensor, window: Sequence[int]) -> tuple[int, int]:
    """Height and width of `x (N, H, W, C)` in whole windows."""
    height, width = x.shape[1], x.shape[2]
    return height + -height % window[0], width + -width % window[1]


def _shifts(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    height, width = _padded(x, window)
    return (shift[0] if window[0] < height else 0), (shift[1] if window[1] < width else 0)


def windows_of(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """`x (N, H, W, C)` -> `(N * windows, positions, C)`."""
    height, width = _padded(x, window)
    down, right = _shifts(x, window, shift)
    n, features = x.shape[0], x.shape[3]
    padded = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if down or right:
        padded = torch.roll(padded, (-down, -right), (1, 2))
    tiles = padded.reshape(n, height // window[0], window[0], width // window[1], window[1], features)
    return tiles.transpose(2, 3).reshape(-1, window[0] * window[1], features)


def from_windows(y: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of `windows_of`, for what was made of the windows of `like`."""
    height, width = _padded(like, window)
    down, right = _shifts(like, window, shift)
    n, features = like.shape[0], y.shape[-1]
    tiles = y.reshape(n, height // window[0], width // window[1], window[0], window[1], features)
    whole = tiles.transpose(2, 3).reshape(n, height, width, features)
    if down or right:
        whole = torch.roll(whole, (down, right), (1, 2))
    return whole[:, : like.shape[1], : like.shape[2]].contiguous()


def without_key(bias: Tensor) -> Tensor:
    """The bias of queries, keys and values with none for the keys, as version 2 has it."""
    query, key, value = bias.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def _regions(like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """`(windows, positions)`: numbers of the regions of the padded picture that the shift has not brought together."""
    numbers = []
    for size, side, moved in zip(_padded(like, window), window, _shifts(like, window, shift), strict=True):
        at = torch.arange(size, device=like.device)
        if moved:
            numbers.append((at >= size - side).long() + (at >= size - moved).long())
        else:  # a side that is not shifted is one region
            numbers.append(torch.zeros_like(at))
    picture = (numbers[0][:, None] * 3 + numbers[1][None]).view(1, len(numbers[0]), len(numbers[1]), 1)
    return windows_of(picture, window, (0, 0)).squeeze(-1)


def attend_windows(
    qkv: Tensor,
    like: Tensor,
    position_bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
    dropout: float,
    logit_scale: Tensor | None,
    training: bool,
) -> Tensor:
    """qkv `(N * windows, positions, 3 C)` -> the context `(N * windows, positions, C)`.

    `logit_scale` asks for version 2's scaled cosines. `like` is the picture the windows are of.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    if logit_scale is not None:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores = scores + position_bias
    if any(_shifts(like, window, shift)):
        regions = _regions(like, window, shift)
        apart = (regions[:, None] != regions[:, :, None]).to(scores.dtype) * _APART
        scores = (scores.unflatten(0, (-1, apart.shape[0])) + apart[:, None]).flatten(0, 1)
    weights = F.dropout(F.softmax(scores, -1), dropout, training)
    return (weights @ v).transpose(1, 2).flatten(2)
