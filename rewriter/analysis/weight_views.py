"""What a node of a graph makes of a weight: the same values, its transpose, a fact about it, or something else.

Nothing is taken for granted: a transpose is one only where its arguments prove it, a cast only where it keeps values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_SAME = {"contiguous", "detach", "clone", "alias"}
_CASTS = {"to", "type_as", "type", "float", "double", "half", "bfloat16", "_to_copy", "convert_element_type"}
_T = {"t", "numpy_T", "adjoint", "T", "mT", "H", "mH"}
_SWAP = {"transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
_DIMS = ("dim0", "dim1", "axis0", "axis1", "source", "destination")
#: facts that merging an adapter into the weight does not change
_FACTS = {"dtype", "device", "shape", "ndim", "layout", "is_cuda", "itemsize", "size", "dim", "numel", "nelement",
          "ndimension", "is_floating_point", "is_complex", "element_size", "get_device", "sym_size"}  # fmt: skip


def name_of(node: fx.Node) -> str | None:
    """The plain name of what a node calls: `transpose` for the method, the function and the ATen operator."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target is getattr:
        return str(node.args[1])
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2] if target.namespace in ("aten", "prims") else None
    name = getattr(target, "__name__", None)
    return name if name is not None and getattr(torch, name, None) is target else None


def source_of(node: fx.Node) -> object:
    """What a method is called on, or a function's first argument."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def is_fact(node: fx.Node, weight: fx.Node) -> bool:
    """Whether a node reads no value of the weight: its shape, its dtype, or another tensor cast to its dtype."""
    name = name_of(node)
    if name in ("to", "type_as") and node.op == "call_method":
        return source_of(node) is not weight and node.args[1:] == (weight,) and not node.kwargs
    return name in _FACTS and source_of(node) is weight


def turned(node: fx.Node) -> bool | None:
    """For a node on a 2-d tensor: True if the result is the transpose, False if it has the same values, else None."""
    name = name_of(node)
    if name in _SAME:
        return False
    if name in _CASTS:
        return False if _keeps_values(node, name) else None
    rest = [*node.args[1:], *(v for k, v in node.kwargs.items() if k not in ("input", "self"))]
    if node.target is getattr:
        return True if name in _T else None
    if name in _T:
        return None if rest else True
    if name in _SWAP:
        keywords = [k for k in node.kwargs if k not in ("input", "self")]
        dims = _dims(rest) if all(k in _DIMS for k in keywords) else None
        return None if dims is None or len(dims) != 2 else dims[0] != dims[1]
    if name == "permute":
        dims = _dims(rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
        return None if dims is None or sorted(dims) != [0, 1] else dims == [1, 0]
    return None


def same_values(node: fx.Node) -> bool:
    """For a node on a tensor of any dimensions: whether the result has the same values in the same places."""
    name = name_of(node)
    return name in _SAME or (name is not None and name in _CASTS and _keeps_values(node, name))


def _dims(values: Sequence[object]) -> list[int] | None:
    """Dimensions of a 2-d tensor, counted from 0; None unless all are known."""
    known = [v for v in values if type(v) is int and -2 <= v < 2]
    return [v % 2 for v in known] if len(known) == len(values) else None


def _keeps_values(node: fx.Node, name: str) -> bool:
    """Whether a cast goes to a floating type of 16 bits or more (or one the graph takes from another tensor)."""
    for value in [*node.args[1:], *node.kwargs.values()]:
        if isinstance(value, torch.dtype) and not (value.is_floating_point and value.itemsize >= 2):
            return False
        if name == "type" and not isinstance(value, (torch.dtype, fx.Node)):
            return False
    return True


def origin(node: object) -> fx.Node | None:
    """The `get_attr` behind casts, for a tensor whose layout plays no role (a bias)."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if turned(node) is not False:
            return None
        node = source_of(node)
    return node if isinstance(node, fx.Node) else None
