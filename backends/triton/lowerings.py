"""Which operators of the dialect have a kernel: each kernel file registers its own here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...passes.graph.products import rows, value
from .kernel_gate import Form, Sizes

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Lowering:
    """How a dialect node becomes a kernel's. `Arguments` are the node's, x first.

    Args:
        kernel: `(base | None, *what build gives) -> (..., out)`.
        build: the kernel's arguments behind base; may add nodes to the graph.
        measure: the arguments, tensors as a capture recorded them -> out, rank, bytes of an entry of the factors.
        forms: `(sizes, number of rows) -> the kernel's way, ATen's way`.
        refuse: why the kernel cannot take these arguments, None if it can.
        bank: whether the second argument is the ids of a bank's call, None where it has nothing to do. A bank's
            tensors are frozen; those of others usually train, so that a backward pass for them is likely.
    """

    kernel: Any
    build: Callable[[fx.Graph, Arguments], Arguments]
    measure: Callable[..., tuple[int, int, int]]
    forms: Callable[[Sizes, int], tuple[Form, Form]]
    refuse: Callable[[Arguments], str | None] = lambda arguments: None
    bank: bool = False

    def idle(self, arguments: Arguments) -> bool:
        """Whether the node has nothing to do at all."""
        return self.bank and arguments[1] is None

    def sizes(self, arguments: Arguments) -> Sizes | None:
        """None where too little is recorded."""
        found: list[Any] = [value(a) if isinstance(a, fx.Node) else a for a in arguments]
        if any(f is None and a is not None for f, a in zip(found, arguments, strict=True)):
            return None
        out, rank, factor = map(int, self.measure(*found))
        x, samples = found[0], found[1].shape[0] if self.bank else 1
        if isinstance(samples, torch.SymInt):
            samples = int(samples.node.hint or 1)  # as many as when it was captured
        return Sizes(rows(arguments[0]), int(x.shape[-1]), out, rank, samples, x.itemsize, factor)


lowerings: dict[torch._ops.OpOverload, Lowering] = {}


def register(operator: torch._ops.OpOverload, lowering: Lowering) -> None:
    """Say which kernel does what an operator of the dialect does."""
    lowerings[operator] = lowering
