"""Finding contractions: what is made of a weight before a product takes it, and which of its dimensions that sums over.

    W  ->  view / permute / unsqueeze / expand / times a number  ->  einsum, tensordot, inner, bmm, matmul, linear

Every step is one whose effect on the dimensions is known, with constants for sizes; anything else ends the search."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..analysis.weight_views import is_fact, name_of, source_of, turned
from .contraction import Contraction
from .linear import Linear, added
from .product import NoMatch, ProductNode, Use, bind, vector

aten = torch.ops.aten

_EINSUM = {torch.einsum, aten.einsum.default}
_BATCHED = {torch.bmm, torch.matmul, operator.matmul, torch.mm, aten.bmm.default, aten.matmul.default, aten.mm.default}
_ADDED = {torch.baddbmm, torch.addmm, aten.baddbmm.default, aten.addmm.default}
_LINEAR = {F.linear, aten.linear.default}
_METHODS = {"bmm": torch.bmm, "matmul": torch.matmul, "mm": torch.mm, "inner": torch.inner}


@dataclass(frozen=True)
class _Weight:
    """What a node holds of the weight.

    Args:
        shape: of the view of the stored weight that the dimensions are of.
        dims: its dimensions in the order they have here; None for one that is broadcast.
        scale: what all of it is multiplied with.
    """

    node: fx.Node
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    scale: float = 1.0

    @property
    def untouched(self) -> bool:
        return self.dims == tuple(range(len(self.shape)))


def match_contraction(use: Use) -> ProductNode | NoMatch | None:
    """The contraction that a use of a weight leads to, through whatever is made of the weight before."""
    shape = tuple(use.tensors[use.name].shape)
    sources = [node for node in use.node.all_input_nodes if node in use.views]
    if len(sources) != 1:
        return None
    dims = tuple(range(len(shape)))
    weight = _Weight(sources[0], shape, dims[::-1] if use.views[sources[0]] else dims)
    node = use.node
    while (made := _step(node, weight)) is not None:
        users = [user for user in node.users if not is_fact(user, node)]
        if len(users) != 1:
            return None
        node, weight = users[0], made
    if sum(value is weight.node for value in _flat(node.args, node.kwargs)) != 1:
        return None
    return _product(use, node, weight)


def _flat(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    values: list[Any] = []
    for value in (*args, *kwargs.values()):
        values += value if isinstance(value, (list, tuple)) else [value]
    return values


# -- what is made of a weight ------------------------------------------------------------------------------------
def _step(node: fx.Node, weight: _Weight) -> _Weight | None:
    """The weight behind a node that reorders, views, broadcasts or scales it; None for any other node."""
    target: Any = node.target
    name = name_of(node)
    name = "neg" if target in (operator.neg, torch.neg) else name
    if target in (operator.mul, torch.mul, operator.truediv, torch.div, aten.mul.Tensor, aten.div.Tensor) or (
        node.op == "call_method" and target in ("mul", "div")
    ):
        return _scaled(node, weight, target)
    if source_of(node) is not weight.node or len(node.all_input_nodes) != 1:
        return None
    rest: list[Any] = [*node.args[1:], *(v for k, v in node.kwargs.items() if k not in ("input", "self"))]
    values: list[Any] = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple, torch.Size)) else rest
    if name == "neg" and not rest:
        return replace(weight, node=node, scale=-weight.scale)
    if len(weight.dims) != 2 and name in ("contiguous", "clone", "detach", "alias") and not rest:
        return replace(weight, node=node)
    if len(weight.dims) == 2 and (turn := turned(node)) is not None:
        return replace(weight, node=node, dims=weight.dims[::-1] if turn else weight.dims)
    if not all(type(value) is int for value in values) or node.kwargs:
        return None
    count = len(weight.dims)
    if name == "unsqueeze" and len(values) == 1 and -count - 1 <= values[0] <= count:
        at = values[0] % (count + 1)
        return replace(weight, node=node, dims=(*weight.dims[:at], None, *weight.dims[at:]))
    if name == "expand" and len(values) >= count:
        kept = values[len(values) - count :]
        if all(d is None or v in (-1, weight.shape[d]) for d, v in zip(weight.dims, kept, strict=True)):
            return replace(weight, node=node, dims=(*[None] * (len(values) - count), *weight.dims))
    if name == "permute" and sorted(v % count for v in values) == list(range(count)):
        return replace(weight, node=node, dims=tuple(weight.dims[v % count] for v in values))
    if name in ("transpose", "swapaxes", "swapdims") and len(values) == 2 and all(-count <= v < count for v in values):
        dims = list(weight.dims)
        first, second = values
        dims[first], dims[second] = dims[second], dims[first]
        return replace(weight, node=node, dims=tuple(dims))
    if name in ("view", "reshape") and weight.untouched:
        sizes = _resolved(values, math.prod(weight.shape))
        return None if sizes is None else replace(weight, node=node, shape=sizes, dims=tuple(range(len(sizes))))
    return None


def _scaled(node: fx.Node, weight: _Weight, target: Any) -> _Weight | None:
    """The weight times or divided by a number."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    number: Any = second if first is weight.node else first
    divides = target in (operator.truediv, torch.div, aten.div.Tensor, "div")
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number == 0:
        return None
    if divides and first is not weight.node:
        return None
    return replace(weight, node=node, scale=weight.scale / number if divides else weight.scale * number)


def _resolved(sizes: Sequence[int], count: int) -> tuple[int, ...] | None:
    known = math.prod(size for size in sizes if size != -1)
    if known <= 0 or sizes.count(-1) > 1 or (count % known if -1 in sizes else known != count):
        return None
    return tuple(count // known if size == -1 else size for size in sizes)


# -- what a product sums over ------------------------------------------------------------------------------------
def _product(use: Use, node: fx.Node, weight: _Weight) -> ProductNode | NoMatch | None:
    target: Any = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    bound: Any
    bias: object = None
    if target in _EINSUM:
        found = _einsum(use, node, weight)
        if not isinstance(found, tuple):
            return found
        x, kind = found
    elif target in (torch.tensordot, torch.inner, aten.inner.default):
        bound = bind(node, ("a", "input", "self"), ("b", "other"), ("dims",), ("out",))
        if bound is None or bound[3] is not None or bound[1] is not weight.node or None in weight.dims:
            return None
        dims = [[-1], [-1]] if target is not torch.tensordot else 2 if bound[2] is None else bound[2]
        x, kind = bound[0], _tensordot(dims, weight)
    elif target in _BATCHED or target in _ADDED or target in _LINEAR:
        bound = _operands(node, target)
        if bound is None or bound[1] is not weight.node or len(weight.dims) < 2:
            return None
        x, _, bias = bound
        pair = weight.dims[-2:] if target not in _LINEAR else weight.dims[-2:][::-1]
        if None in pair:
            return None
        if any(dim is not None for dim in weight.dims[:-2]):
            return NoMatch(f"{use.name!r} has one matrix for each entry of a batch there", node.name)
        kind = _kind(weight, pair[:1], pair[1:])
    else:
        return None
    if kind is None or not isinstance(x, fx.Node) or x in use.views:
        return None
    found_node = _with_bias(use, node, x, kind, bias)
    broadcast = None in weight.dims and target not in (torch.bmm, torch.baddbmm, aten.bmm.default, aten.baddbmm.default)
    if isinstance(found_node, NoMatch) or broadcast or kind.shape != tuple(use.tensors[use.name].shape):
        return found_node
    plain = Contraction(shape=kind.shape, contracted=kind.contracted, produced=kind.produced)
    if kind != plain or len(kind.shape) != 2:
        return found_node
    return replace(found_node, product=Linear(contracted=kind.contracted[0]))


def _with_bias(use: Use, node: fx.Node, x: fx.Node, kind: Contraction, bias: object) -> ProductNode | NoMatch:
    """The product, and the bias where it is a vector of its own that nothing scales."""
    flat = kind.scale == 1 and len(kind.produced) == 1 and not kind.spread
    length = kind.shape[kind.produced[0]]
    if bias is not None:
        found = vector(bias, length, use.tensors)
        if found is None and not isinstance(bias, fx.Node):
            return NoMatch("the bias is not a plain parameter", node.name)
        return ProductNode(node, x, use.read, use.name, kind, found if flat else None, "contraction")
    behind = added(node)
    found = None if behind is None or not flat else vector(behind, length, use.tensors)
    return ProductNode(node, x, use.read, use.name, kind, found, "matmul")


def _kind(weight: _Weight, contracted: Sequence[Any], produced: Sequence[Any], **more: Any) -> Contraction | None:
    if not contracted or not produced or sorted([*contracted, *produced]) != list(range(len(weight.shape))):
        return None
    return Contraction(
        shape=weight.shape, contracted=tuple(contracted), produced=tuple(produced), scale=weight.scale, **more
    )


def _operands(node: fx.Node, target: Any) -> tuple[Any, Any, Any] | None:
    """x, the weight and the bias of a product of matrices."""
    if target in _ADDED:
        bound = bind(node, ("input", "self"), ("mat1", "batch1"), ("mat2", "batch2"), ("beta",), ("alpha",))
        if bound is None or any(value is not None and value != 1 for value in bound[3:]):
            return None
        return bound[1], bound[2], bound[0]
    bound = bind(node, ("input", "self"), ("other", "mat2", "weight"), ("bias",))
    return None if bound is None else (bound[0], bound[1], bound[2])


def _tensordot(dims: Any, weight: _Weight) -> Contraction | None:
    order = [dim for dim in weight.dims if dim is not None]
    if type(dims) is int:
        if not 0 < dims < len(order):
            return None
        return _kind(weight, order[:dims], order[dims:])
    if not isinstance(dims, (list, tuple)) or len(dims) != 2:
        return None
    of_x, of_weight = ([one] if type(one) is int else list(one) for one in dims)
    if len(of_x) != len(of_weight) or not all(type(dim) is int for dim in (*of_x, *of_weight)):
        return None
    if not all(-len(order) <= dim < len(order) for dim in of_weight):
        return None
    contracted = [order[dim] for dim in of_weight]
    moved = () if of_x == list(range(-len(of_x), 0)) else tuple(of_x)
    return _kind(weight, contracted, [dim for dim in order if dim not in contracted], gather=moved or "")


def _einsum(use: Use, node: fx.Node, weight: _Weight) -> tuple[Any, Contraction | None] | NoMatch | None:
    given: list[Any] = [*node.args]
    if not given:
        return None
    equation, operands = given[0], given[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs or None in weight.dims:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    at = 0 if operands[0] is weight.node else 1
    of_weight, of_x = terms[at], _tokens(terms[1 - at])
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    of_out = _tokens(out)
    if len(of_weight) != len(weight.dims) or len({*of_weight}) != len(of_weight) or len({*of_x}) != len(of_x):
        return NoMatch(f"{equation!r} is more than a product with {use.name!r}", node.name)
    where = dict(zip(of_weight, (dim for dim in weight.dims if dim is not None), strict=True))
    if both := [c for c in of_weight if c in of_x and c in of_out]:
        return NoMatch(f"{use.name!r} has one matrix for each entry of {both[0]!r} in {equation!r}", node.name)
    if alone := [c for c in of_weight if c not in of_x and c not in of_out]:
        return NoMatch(f"{equation!r} sums {use.name!r} over {alone[0]!r} by itself", node.name)
    contracted, produced = [c for c in of_x if c in where], [c for c in of_out if c in where]
    batch = [c for c in of_x if c in of_out]
    if {*of_out} != {*batch, *produced} or ("..." in of_x and "..." not in of_out):
        return NoMatch(f"{equation!r} is more than a product with {use.name!r}", node.name)
    gather = f"{''.join(of_x)}->{''.join([*batch, *contracted])}"
    spread = f"{''.join([*batch, *produced])}->{out}"
    kind = _kind(
        weight,
        [where[c] for c in contracted],
        [where[c] for c in produced],
        gather="" if of_x == [*batch, *contracted] else gather,
        spread="" if of_out == [*batch, *produced] else spread,
    )
    return operands[1 - at], kind


def _tokens(term: str) -> list[str]:
    """The letters of a term of an equation, an ellipsis as one."""
    before, dots, after = term.partition("...")
    return [*before, *([dots] if dots else []), *after]
