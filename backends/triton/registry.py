"""Which operators of the dialect have a kernel: each kernel file registers its own here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...passes.graph.products import rows, value
from ...rewriter.dialect import reads
from .gates import Form, Sizes

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Lowering:
    """How a dialect node becomes a kernel's. `Arguments` are the node's, x first.

    Args:
        kernel: `(base | None, *what build gives) -> (..., out)`.
        build: the kernel's arguments behind base; may add nodes to the graph.
        measure: `(out, rank, samples, bytes of an entry of the factors)`, or None where too little is recorded.
        forms: `(sizes, number of rows) -> the kernel's way, ATen's way`.
        refuse: why the kernel cannot take these arguments, None if it can.
        idle: whether the node has nothing to do at all.
        trained: whether its tensors usually train, so that a backward pass for them is likely.
    """

    kernel: Any
    build: Callable[[fx.Graph, Arguments], Arguments]
    measure: Callable[[Arguments], tuple[int, int, int, int] | None]
    forms: Callable[[Sizes, int], tuple[Form, Form]]
    refuse: Callable[[Arguments], str | None] = lambda arguments: None
    idle: Callable[[Arguments], bool] = lambda arguments: False
    trained: bool = True

    def sizes(self, arguments: Arguments) -> Sizes | None:
        x, found = value(arguments[0]), self.measure(arguments)
        if x is None or found is None:
            return None
        out, rank, samples, factor = found
        return Sizes(rows(arguments[0]), int(x.shape[-1]), out, rank, samples, x.itemsize, factor)


lowerings: dict[torch._ops.OpOverload, Lowering] = {}


def register(operator: torch._ops.OpOverload, lowering: Lowering) -> None:
    """Say which kernel does what an operator of the dialect does."""
    lowerings[operator] = lowering


def samples(ids: Any) -> int:
    """How many samples a graph's vector of ids has when captured; 1 where nothing is recorded."""
    found = value(ids)
    if found is None:
        return 1
    count = found.shape[0]
    return int(count.node.hint or 1) if isinstance(count, torch.SymInt) else int(count)


#: what `Share` makes of several nodes -> the same with a kernel inside
shared: dict[Callable[..., Any], Callable[..., Any]] = {}


def register_shared(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Say what takes the place of a function that `Share` puts into a graph; same arguments, same results."""
    shared[function] = replacement
    reads(fresh=True)(replacement)
