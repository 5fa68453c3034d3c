"""Calls of every kernel to compile without a GPU (`resources.py`): each kernel file registers its own here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .launch import Launch


@dataclass(frozen=True)
class Shape:
    """Sizes of a call that is compiled as an example; `rank` is LoRA's, others have their own."""

    samples: int
    tokens: int
    inner: int
    out: int
    rank: int

    def __str__(self) -> str:
        return f"{self.samples} x {self.tokens}"


Empty = Callable[..., Tensor]
Examples = Callable[[Empty, Shape, Tensor, Tensor, Tensor], Iterator[tuple[str, list[Launch]]]]
examples: dict[str, Examples] = {}


def register_examples(kernel: str) -> Callable[[Examples], Examples]:
    """Have the launches that the decorated function makes compiled under a kernel's name.

    It is `(empty, shape, x, y, ids) -> (case, launches) ...`: `empty(*sizes, dtype=...)` makes a tensor without memory,
    in x's dtype if none is given; x `(rows, in)`, y `(rows, out)`, ids `(samples,)`.
    """

    def register(function: Examples) -> Examples:
        examples[kernel] = function
        return function

    return register
