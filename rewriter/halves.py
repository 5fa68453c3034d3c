"""The two halves of a low-rank operator: from the input down to a few numbers, and from these up to the delta.

    op(x, *tensors)  ==  up(F.linear(x, down(*tensors)), *tensors)

A method registers its halves beside its operator, so that passes can share, join or move the products without knowing
its arithmetic. `across` gives the up half as a factor where it is a plain product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .analysis.effects import register_effect
from .dialect import cast
from .sites import NoMatch


@dataclass(frozen=True)
class Halves:
    """How an operator splits. The functions take the operator's arguments behind its inputs.

    Args:
        down: -> `(q, in)`; the products of the whole group can be one.
        across: -> `(out, q)` with `up(z) = z across^T`; None where the up half is more than a product.
        up: `(z (..., q), *arguments) -> (..., out)`, in z's dtype.
        inputs: how many leading arguments are the input; they must be one and the same node (a dropped copy is not).
    """

    down: Callable[..., Tensor]
    across: Callable[..., Tensor] | None
    up: Callable[..., Tensor]
    inputs: int = 1


_pure: set[object] = set()
_halves: dict[torch._ops.OpOverload, Halves] = {}


def register_halves(
    operator: torch._ops.OpOverload,
    down: Callable[..., Tensor],
    *,
    across: Callable[..., Tensor] | None = None,
    up: Callable[..., Tensor] | None = None,
    inputs: int = 1,
) -> None:
    """Say how an operator splits; give `across`, or `up`, or both where `up` is cheaper than the factor."""
    if up is None:
        assert across is not None, "an operator needs across or up"
        factor = across

        def product(z: Tensor, *arguments: Any) -> Tensor:
            return F.linear(z, cast(factor(*arguments), z))

        product.__name__ = across.__name__.replace("across", "up")
        up = product
    _halves[operator] = Halves(down, across, up, inputs)
    for function in (down, across):
        if function is not None:
            _pure.add(function)
            register_effect(function)
    register_effect(up, fresh=True)


def is_pure(target: object) -> bool:
    """Whether a function in a graph makes a factor, so that two calls with the same tensors are one."""
    return target in _pure


def split(node: fx.Node) -> tuple[Halves, fx.Node, tuple[Any, ...]] | NoMatch:
    """The halves of a dialect node, its input and its other arguments."""
    halves = _halves.get(node.target)  # type: ignore[call-overload]
    if halves is None:
        return NoMatch(f"{node.target} is no low-rank operator", node.name)
    if node.kwargs:
        return NoMatch(f"{node.name} has keyword arguments", node.name)
    inputs = node.args[: halves.inputs]
    if any(value is not inputs[0] for value in inputs):
        return NoMatch(f"{node.name} reads more than one input (dropout is on)", node.name)
    return halves, inputs[0], node.args[halves.inputs :]  # type: ignore[return-value]
