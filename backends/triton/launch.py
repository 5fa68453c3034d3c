"""One kernel call as a value, so that what runs is what the ahead-of-time compilation of the tests compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .optional_triton import INTERPRETED


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments in order.

    Args:
        kernel: the `triton.jit` function.
        grid: programs along up to three axes.
        arguments: tensors, None, numbers and tuples of these, by name.
        constants: the `tl.constexpr` parameters by name.
        warps, stages: of a program, and of its software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


def run(launches: Iterable[Launch]) -> None:
    """Launch one after the other, on the device of their tensors and its current stream."""
    for launch in launches:
        if 0 in launch.grid:
            continue
        first = next(value for value in launch.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(first) if first.is_cuda else contextlib.nullcontext():
            options = {} if INTERPRETED else {"num_warps": launch.warps, "num_stages": launch.stages}
            launch.kernel[launch.grid](**launch.arguments, **launch.constants, **options)
