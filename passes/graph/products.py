"""The base's product in a whole graph, in any of its spellings, a delta's halves, and the sum of both."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ...rewriter.analysis.effects import value
from ...rewriter.analysis.memory import Memory
from ...rewriter.dialect import Halves, traits_of
from ...rewriter.emitter import add_delta
from ...rewriter.sites import NoMatch

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


def split(node: fx.Node) -> tuple[Halves, fx.Node, tuple[Any, ...]] | NoMatch:
    """The halves of a dialect node, its input and its other arguments."""
    halves = traits_of(node.target).halves
    if halves is None:
        return NoMatch(f"{node.target} is no low-rank operator", node.name)
    if node.kwargs:
        return NoMatch(f"{node.name} has keyword arguments", node.name)
    x: Any = node.args[0]
    if any(value is not x for value in node.args[: halves.inputs]):
        return NoMatch(f"{node.name} reads more than one input (dropout is on)", node.name)
    return halves, x, node.args[halves.inputs :]


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


def one_product(
    memory: Memory, node: fx.Node, base: Product, delta: fx.Node, x: fx.Node, arguments: tuple[Any, ...]
) -> NoMatch | None:
    """Why the sum of a product and a delta may not become one operation where the sum stands; None where it may.

    Args:
        x: what the delta reads; arguments: its other tensors, factors of the weight's delta.
    """
    read = (base.x, base.weight, base.bias, x, *arguments)
    # whatever stands between the two products and the sum must leave their operands as they are
    if (reason := memory.changed(read, min(base.node, delta), node)) is not None:
        return reason
    if not memory.private(base.node):
        return NoMatch(f"{base.node.name} is not new memory", node.name)
    seen = {"sum": value(node), "delta": value(delta), "product": value(base.node), "input": value(base.x)}
    seen |= {"weight": value(base.weight), "bias": value(base.bias)}
    known = {name: tensor.dtype for name, tensor in seen.items() if tensor is not None}
    if len(set(known.values())) > 1:
        text = ", ".join(f"{name} {dtype}" for name, dtype in known.items())
        return NoMatch(f"the numbers are rounded on the way (autocast, or casts): {text}", node.name)
    if seen["product"] is None and (autocast() or memory.modes() is not None):
        return NoMatch("nothing is recorded of the product, and autocast may round it", node.name)
    if seen["sum"] is not None and seen["product"] is not None and seen["sum"].shape != seen["product"].shape:
        return NoMatch("the delta has other dimensions than the product", node.name)
    return coarse(x, arguments, node)


def coarse(x: fx.Node, arguments: tuple[Any, ...], node: fx.Node) -> NoMatch | None:
    """Whether an adapter's tensors are coarser than its input: factors made of them would round what the operator,
    which casts them first, does not."""
    given = value(x)
    if given is None or not given.dtype.is_floating_point:
        return None
    for tensor in map(value, arguments):
        if tensor is None or not tensor.dtype.is_floating_point:
            continue
        if tensor.dtype.itemsize < given.dtype.itemsize:
            return NoMatch(f"{tensor.dtype} factors would be rounded before {given.dtype} sees them", node.name)
    return None


def autocast() -> bool:
    """Whether the graph at hand was traced, and will run, inside of `torch.autocast`."""
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


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
