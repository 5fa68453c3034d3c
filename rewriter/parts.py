"""Parts of a fused weight: how its produced dimension is cut, and where the rows of a part lie.

[ q | k | v ]                      groups 1: a part is one block
[ q0 k0 v0 | q1 k1 v1 | ... ]      groups = heads: a part is a block of every stretch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _now(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@dataclass(frozen=True)
class Rows:
    """A block of `size` rows from `start` on, in each of `groups` stretches of `stride` rows.

    `call` is how a method calls a function: at once, or as a node of a graph.
    """

    start: int
    size: int
    groups: int
    stride: int

    def __str__(self) -> str:
        every = f" of each {self.stride}" if self.groups > 1 else ""
        return f"rows {self.start}..{self.start + self.size - 1}{every} of {self.groups * self.stride}"

    def meets(self, other: Rows) -> bool:
        """Whether a row may be one of both."""
        alike = (self.groups, self.stride) == (other.groups, other.stride)
        return not alike or (self.start < other.start + other.size and other.start < self.start + self.size)

    def blocks(self, tensor: Any, dim: int, call: Callable[..., Any] = _now) -> Any:
        """A view of the rows: one dimension for one stretch, else `(groups, size)` in its place."""
        if self.groups > 1:
            tensor = call(torch.unflatten, tensor, dim, (self.groups, self.stride))
            dim = dim + 1 if dim >= 0 else dim
        return call(torch.narrow, tensor, dim, self.start, self.size)

    def split(self, values: Any, dim: int, call: Callable[..., Any] = _now) -> Any:
        """Values for the rows, one after the other, in the dimensions of `blocks`."""
        return values if self.groups == 1 else call(torch.unflatten, values, dim, (self.groups, self.size))

    def take(self, tensor: Any, dim: int, call: Callable[..., Any] = _now) -> Any:
        """The rows one after the other: a view of one stretch, a copy of several."""
        found = self.blocks(tensor, dim, call)
        first = dim if dim >= 0 else dim - 1
        return found if self.groups == 1 else call(torch.flatten, found, first, first + 1)


@dataclass(frozen=True)
class Cut:
    """How the produced dimension of a weight is cut: `groups` equal stretches, each into parts of these sizes.

    Args:
        names: for each part, what a model with a layer for every part calls it, the usual name first; empty where
            nobody knows.
    """

    sizes: tuple[int, ...]
    groups: int = 1
    names: tuple[tuple[str, ...], ...] = field(default=(), compare=False)

    @property
    def produced(self) -> int:
        return self.groups * sum(self.sizes)

    @property
    def equal(self) -> bool:
        """Whether the number of parts says it all."""
        return self.groups == 1 and len(set(self.sizes)) == 1

    @property
    def plain(self) -> tuple[int, ...]:
        """`(groups, *sizes)`; empty where the number of parts says it all."""
        return () if self.equal else (self.groups, *self.sizes)

    def __str__(self) -> str:
        each = self.sizes[:1] if len(set(self.sizes)) == 1 else self.sizes
        parts = f"{len(self.sizes)} parts of {'/'.join(map(str, each))}"
        return parts if self.groups == 1 else f"{parts} in {self.groups} stretches"

    def rows(self, part: int) -> Rows:
        return Rows(sum(self.sizes[:part]), self.sizes[part], self.groups, sum(self.sizes))

    def number(self, name: str) -> int | None:
        """The part of a name."""
        return next((i for i, names in enumerate(self.names) if name in names), None)


def cut_from(plain: Sequence[int]) -> Cut:
    """The inverse of `Cut.plain`, for one that is not empty."""
    groups, *sizes = plain
    return Cut(tuple(sizes), groups)


def put(rows: Rows | None, tensor: Tensor, values: Tensor, dim: int) -> None:
    """Write values for the rows (None: all) of a tensor whose dimension `dim` is the produced one."""
    (tensor if rows is None else rows.blocks(tensor, dim)).copy_(values if rows is None else rows.split(values, dim))
