"""The base's product in a whole graph, in any of its spellings, and the sum of it with a delta."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.graft import add_delta
from ..rewriter.sites import NoMatch

aten = torch.ops.aten
LINEAR = {F.linear, torch._C._nn.linear, aten.linear.default}
ADDMM = {torch.addmm, aten.addmm.default}
SUMS = {operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor, add_delta}


@dataclass(frozen=True)
class Product:
    """`x W^T (+ b)`.

    Args:
        node: the node; weight: `(out, in)`, or `(in, out)` where `transposed` (Conv1D); bias: `(out,)` or None.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool = False


def product(node: object) -> Product | NoMatch:
    """The linear product that a node is."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return NoMatch("not a call", str(node))
    arguments: list[Any] = [*node.args, *node.kwargs.values()]
    if node.target in LINEAR and list(node.kwargs) in ([], ["bias"]):
        x, weight, *bias = arguments
        return Product(node, x, weight, bias[0] if bias else None)
    if node.target in ADDMM and not node.kwargs:
        bias, x, weight = arguments
        return Product(node, x, weight, bias, transposed=True)
    return NoMatch(f"{node.target} is no linear product", node.name)


def summed(node: fx.Node) -> tuple[Product, fx.Node] | NoMatch:
    """The product and the delta of a sum `y + delta` in which nobody else reads either."""
    if node.op != "call_function" or node.target not in SUMS or len(node.args) != 2 or node.kwargs:
        return NoMatch("not a sum of two", node.name)
    y, delta = node.args
    found = product(y)
    if isinstance(found, NoMatch):
        return found
    if not isinstance(delta, fx.Node):
        return NoMatch("adds a number", node.name)
    for part in (found.node, delta):
        if len(part.users) != 1:
            return NoMatch(f"{part.name} is read by others too", node.name)
    return found, delta


def value(node: object) -> Tensor | None:
    """What a compiler recorded of a node's result: its shape, dtype and device."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value", node.meta.get("val"))
    if found is None and node.op == "get_attr":
        owner: object = node.graph.owning_module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        found = owner
    return found if isinstance(found, Tensor) else None


def rows(node: fx.Node) -> int | torch.SymInt | None:
    """How many rows an input `(..., in)` has; None where nothing is recorded."""
    x = value(node)
    if x is None or x.dim() == 0:
        return None
    count: int | torch.SymInt = 1
    for size in x.shape[:-1]:
        count = count * size
    return count


def least_dimension(arguments: tuple[object, ...]) -> int:
    """The rank of an adapter, as the smallest dimension of its factors; 8 where nothing is recorded of them."""
    sizes = [int(min(t.shape)) for a in arguments if (t := value(a)) is not None and t.dim() == 2]
    return min(sizes, default=8)
