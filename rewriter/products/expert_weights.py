"""Parameters that stack a matrix per expert, told from the source of the forward that reads them.

    F.linear(x, self.gate_up_proj[e])      (E, out, in)
    x @ self.gate_up_proj[e] + ...         (E, in, out), as GPT-OSS stores them
    torch.bmm(x, self.gate_up_proj)        (E, in, out), as Llama4 does

torch.fx cannot follow such a forward: which experts run depends on the data. What reads the parameter in any other way
is a `NoMatch` with the reason. transformers may run its own function in the forward's place (`experts_forward.py`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..grafted_class import base_class
from .product import NoMatch

_CASTS = frozenset(("float", "half", "bfloat16", "double", "to", "type_as", "contiguous"))
_FACTS = frozenset(("shape", "dtype", "device", "ndim", "size", "dim", "numel", "data_ptr", "is_contiguous", "stride"))
_TURNS = frozenset(("T", "mT"))
_PRODUCTS = frozenset(("matmul", "mm", "bmm"))


def contracted_dim(module: nn.Module, attribute: str) -> int | NoMatch:
    """Which dimension of one matrix of a 3-d parameter is summed over: 1 for `(out, in)`, 0 for `(in, out)`."""
    cls: Any = base_class(module)
    if "forward" in module.__dict__:
        return NoMatch(f"{cls.__name__} has its forward replaced on the instance")
    found = _from_source(cls, attribute)
    if isinstance(found, NoMatch):
        return found
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool) and said != (found == 0):
        return NoMatch(f"{cls.__name__}.is_transposed is {said}, and its forward multiplies the other way round")
    return found


def is_experts(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is a stack of matrices that the module's own forward multiplies with."""
    parameter = dict(module._parameters.items()).get(attribute)  # of a scripted module it is no dict
    return parameter is not None and parameter.dim() == 3 and not isinstance(contracted_dim(module, attribute), NoMatch)


@functools.lru_cache(maxsize=1024)
def _from_source(cls: type[nn.Module], attribute: str) -> int | NoMatch:
    function = _parsed(cls.forward)
    if function is None:
        return NoMatch(f"the source of the forward of {cls.__name__} cannot be read")
    me = function.args.args[0].arg
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    if written := [n.attr for n in ast.walk(function) if _is_own(n, me) and not isinstance(n.ctx, ast.Load)]:  # type: ignore[attr-defined]
        return NoMatch(f"the forward of {cls.__name__} changes {written[0]!r} of itself")
    reads = [n for n in ast.walk(function) if _is_own(n, me) and n.attr == attribute]  # type: ignore[attr-defined]
    if not reads:
        return NoMatch(f"{attribute!r} is not read by the module's own forward")
    if other := _read_elsewhere(cls, attribute, function, {"forward"}):
        return NoMatch(
            f"{other!r} of {cls.__name__}, which its forward calls, reads {attribute!r} too, and adapters are put "
            "beside the products of the forward alone"
        )
    dims: set[int | None] = set()
    for read in reads:
        dims |= set(_products(read, parents, function, 0))
    dims.discard(-1)
    if None in dims or not dims:
        return NoMatch(f"how the forward of {cls.__name__} uses {attribute!r} is no product with one expert's matrix")
    if len(dims) > 1:
        return NoMatch(f"{attribute!r} is used both as it is and transposed")
    return dims.pop()  # type: ignore[return-value]


def _read_elsewhere(cls: type[nn.Module], attribute: str, function: ast.FunctionDef, seen: set[str]) -> str:
    """The method or property that a function takes of its module and that reads the parameter; empty for none.

    It belongs to the module itself, which has the base's values.
    """
    me = function.args.args[0].arg
    for name in sorted({n.attr for n in ast.walk(function) if _is_own(n, me)} - seen):  # type: ignore[attr-defined]
        seen.add(name)
        held = getattr(cls, name, None)
        called: Any = held.fget if isinstance(held, property) else held
        if not inspect.isfunction(called) or hasattr(nn.Module, name):
            continue
        tree = _parsed(called)
        if tree is None:
            continue
        own = tree.args.args[0].arg
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for read in (n for n in ast.walk(tree) if _is_own(n, own) and n.attr == attribute):  # type: ignore[attr-defined]
            if set(_products(read, parents, tree, 0)) != {-1}:
                return name
        if further := _read_elsewhere(cls, attribute, tree, seen):
            return further
    return ""


def _parsed(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source: made at run time
        return None
    return tree if isinstance(tree, ast.FunctionDef) and tree.args.args else None


def _is_own(node: ast.AST, me: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me


def _products(
    node: ast.AST, parents: dict[ast.AST, ast.AST], function: ast.FunctionDef, turns: int, depth: int = 8
) -> Iterator[int | None]:
    """The contracted dimension at every use of an expression of a weight; -1 for a fact about it, None for others."""
    outer = parents.get(node)
    if isinstance(outer, ast.Subscript) and outer.value is node:
        index = outer.slice
        if isinstance(index, (ast.Slice, ast.Tuple)):
            yield None
        else:
            yield from _products(outer, parents, function, turns, depth)
    elif isinstance(outer, ast.Attribute):
        call = parents.get(outer)
        called = isinstance(call, ast.Call) and call.func is outer
        if outer.attr in _FACTS:
            yield -1
        elif outer.attr in _TURNS and not called:
            yield from _products(outer, parents, function, turns + 1, depth)
        elif called and outer.attr in _CASTS:
            yield from _products(call, parents, function, turns, depth)  # type: ignore[arg-type]
        elif called and outer.attr == "t":
            yield from _products(call, parents, function, turns + 1, depth)  # type: ignore[arg-type]
        else:
            yield None
    elif isinstance(outer, ast.BinOp) and isinstance(outer.op, ast.MatMult) and outer.right is node:
        yield turns % 2
    elif isinstance(outer, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in outer.ops):
        yield -1
    elif isinstance(outer, ast.Call):
        yield _in_call(outer, node, turns)
    elif isinstance(outer, ast.Assign) and len(outer.targets) == 1 and isinstance(outer.targets[0], ast.Name) and depth:
        name = outer.targets[0].id
        uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name]
        if sum(isinstance(n.ctx, ast.Store) for n in uses) > 1:
            yield None
        for use in uses:
            if isinstance(use.ctx, ast.Load):
                yield from _products(use, parents, function, turns, depth - 1)
    else:
        yield None


def _in_call(call: ast.Call, node: ast.AST, turns: int) -> int | None:
    function = call.func
    name = (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )
    second = (len(call.args) > 1 and call.args[1] is node) or any(
        k.value is node and k.arg in ("weight", "mat2", "other") for k in call.keywords
    )
    if name == "linear" and second:
        return 1 - turns % 2
    of_torch = (
        isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "torch"
    )
    operand = second if of_torch else bool(call.args) and call.args[0] is node
    return turns % 2 if name in _PRODUCTS and operand else None
