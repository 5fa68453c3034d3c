"""Linear products in a graph: which node multiplies with which weight, which way round, and adds which bias.

`F.linear`, `addmm` (HF Conv1D), `matmul` / `@` / `mm` with a parameter on the right and their ATen forms are one thing
here. Whatever is not linear-like, or a weight whose uses do not agree, is a `NoMatch` with the reason."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..sites import NoMatch
from .weight_views import is_fact, origin, source_of, turned

aten = torch.ops.aten

_LINEAR = {F.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default}
_ADD = {torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor}
_METHODS = {"matmul": torch.matmul, "mm": torch.mm, "addmm": torch.addmm, "add": torch.add, "add_": torch.add}


@dataclass(frozen=True)
class LinearNode:
    """One linear-like node of a traced graph.

    Args:
        node: the node that computes `x W^T (+ b)`.
        x: its input, `(..., in)`.
        weight: the `get_attr` of the weight; `weight_name` its attribute path.
        contracted: which dimension of the stored weight is summed over: 1 for `(out, in)`, 0 for `(in, out)`.
        bias_name: attribute path of the bias the product adds, which nothing else reads, or None.
        form: how it is written: `linear`, `addmm` or `matmul`.
        host: `Site.host`.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    weight_name: str
    contracted: int
    bias_name: str | None
    form: str
    host: str | None = None


@dataclass(frozen=True)
class _Product:
    """The operands of a product as it is written; `linear` says that the weight is `(out, in)` there."""

    form: str
    x: object
    weight: object
    bias: object
    linear: bool


def _bind(node: fx.Node, *names: tuple[str, ...]) -> list[Any] | None:
    """The arguments by position or by any of their names; None where there are others."""
    if len(node.args) > len(names) or set(node.kwargs) - {n for known in names for n in known}:
        return None
    given = list(node.args)
    return given + [next((node.kwargs[n] for n in known if n in node.kwargs), None) for known in names[len(given) :]]


def _callee(node: fx.Node) -> Any:
    return _METHODS.get(str(node.target)) if node.op == "call_method" else node.target


def _product(node: fx.Node) -> _Product | NoMatch:
    target = _callee(node)
    if target in _LINEAR:
        bound = _bind(node, ("input",), ("weight",), ("bias",))
        if bound is not None:
            return _Product("linear", bound[0], bound[1], bound[2], True)
    elif target in _ADDMM:
        bound = _bind(node, ("input", "self"), ("mat1",), ("mat2",), ("beta",), ("alpha",))
        if bound is not None:
            scaled = len(node.args) > 3 or any(not _is_one(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))
            if scaled:
                return NoMatch("addmm with alpha or beta other than 1", node.name)
            return _Product("addmm", bound[1], bound[2], bound[0], False)
    elif target in _MATMUL:
        bound = _bind(node, ("input", "self"), ("other", "mat2"))
        if bound is not None:
            return _Product("matmul", bound[0], bound[1], None, False)
    else:
        return NoMatch(f"{node.op} {node.target} is not a linear product", node.name)
    return NoMatch(f"{node.target} is called with arguments that are not understood", node.name)


def _is_one(value: object) -> bool:
    return isinstance(value, (int, float)) and value == 1


def _match(
    node: fx.Node, views: Mapping[fx.Node, bool], read: fx.Node, name: str, tensors: Mapping[str, Tensor]
) -> LinearNode | NoMatch:
    """A node that uses the weight `name` as a product with it. `views`: its reads, and whether they are transposed."""
    product = _product(node)
    if isinstance(product, NoMatch):
        return product
    if isinstance(product.x, fx.Node) and product.x in views:
        return NoMatch(f"{name!r} is the left operand of the product", node.name)
    if product.weight not in views or product.bias in views:
        return NoMatch(f"{name!r} is no weight of the product", node.name)
    if not isinstance(product.x, fx.Node):
        return NoMatch("the input is a constant", node.name)
    contracted = int(product.linear != views[product.weight])  # type: ignore[index]
    out_features = tensors[name].shape[1 - contracted]
    bias = product.bias
    if product.form == "matmul":
        bias = _added(node)
    found = None if bias is None else _vector(bias, out_features, tensors)
    if bias is not None and found is None and product.form != "matmul":
        return NoMatch("the bias is not a plain parameter", node.name)
    return LinearNode(node, product.x, read, name, contracted, found, product.form)


def _added(node: fx.Node) -> object:
    """What is added, unscaled, to a product that nothing else reads: `x @ W + b`."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    bound = _bind(user, ("input", "self"), ("other",), ("alpha",)) if _callee(user) in _ADD else None
    if bound is None or len(user.args) > 2 or not _is_one(user.kwargs.get("alpha", 1)):
        return None
    first, second = bound[:2]
    return second if first is node else first


def _vector(node: object, length: int, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a parameter `(length,)`, casts aside."""
    read = origin(node)
    name = str(read.target) if read is not None else ""
    return name if name in tensors and tuple(tensors[name].shape) == (length,) else None


def find_linears(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, list[LinearNode] | NoMatch]:
    """For each 2-d parameter of `tensors`: its linear-like nodes, or the reason why it has none.

    All uses of a parameter must agree, on what is contracted and on the bias. One that is also used in another way (a
    norm, an embedding, a sum) is a `NoMatch`: an adapter on the product alone would not be what merging the weight
    computes.
    """
    return {name: _linears_of(graph, name, tensors) for name, tensor in tensors.items() if tensor.dim() == 2}


def _linears_of(graph: fx.Graph, name: str, tensors: Mapping[str, Tensor]) -> list[LinearNode] | NoMatch:
    twins = [other for other, tensor in tensors.items() if tensor is tensors[name] and other != name]
    if twins:
        return NoMatch(f"{name!r} and {twins[0]!r} are one parameter")
    if tensors[name].is_complex():
        return NoMatch(f"{name!r} is {tensors[name].dtype}, and adapters are real")
    reads = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
    if not reads:
        return NoMatch(f"{name!r} is not read by the module's own forward")
    views = dict.fromkeys(reads, False)
    origins = {read: read for read in reads}
    uses: dict[fx.Node, fx.Node] = {}
    pending = list(reads)
    while pending:
        view = pending.pop()
        for user in view.users:
            if is_fact(user, view):
                continue
            turn = turned(user) if source_of(user) is view and len(user.all_input_nodes) <= 2 else None
            if turn is None:
                uses[user] = origins[view]
            elif user not in views:
                views[user], origins[user] = views[view] != turn, origins[view]
                pending.append(user)
    found: list[LinearNode] = []
    for node in graph.nodes:
        if node in uses:
            match = _match(node, views, uses[node], name, tensors)
            if isinstance(match, NoMatch):
                return match
            found.append(match)
    if not found:
        return NoMatch(f"{name!r} is read but not used in a product")
    return _agreed(graph, found, tensors)


def _agreed(graph: fx.Graph, found: list[LinearNode], tensors: Mapping[str, Tensor]) -> list[LinearNode] | NoMatch:
    """The uses of one weight if they agree; the bias of `x @ W + b` counts only where it is the weight's own."""
    name = found[0].weight_name
    if len({linear.contracted for linear in found}) > 1:
        return NoMatch(f"{name!r} is used both as it is and transposed", found[-1].node.name)
    biases = {linear.bias_name for linear in found}
    shared = next((why for b in biases if b is not None and (why := _also_read(graph, b, found, tensors))), "")
    if len(biases) == 1 and not shared and len({linear.form == "matmul" for linear in found if biases != {None}}) <= 1:
        return found
    if all(linear.form == "matmul" for linear in found):
        return [replace(linear, bias_name=None) for linear in found]
    return NoMatch(shared or f"{name!r} is used with different biases: {sorted(map(str, biases))}", found[-1].node.name)


def _times(user: fx.Node, node: fx.Node) -> int:
    return sum(value is node for value in [*user.args, *user.kwargs.values()])


def _also_read(graph: fx.Graph, bias: str, found: list[LinearNode], tensors: Mapping[str, Tensor]) -> str:
    """Who else reads a bias than the products of its weight; empty for nobody."""
    if any(tensor is tensors[bias] and other != bias for other, tensor in tensors.items()):
        return f"the bias {bias!r} has another name, and is read by it"
    own = {linear.node if linear.form != "matmul" else next(iter(linear.node.users)) for linear in found}
    pending = [n for n in graph.nodes if n.op == "get_attr" and n.target == bias]
    while pending:
        read = pending.pop()
        for user in read.users:
            if is_fact(user, read) or (user in own and _times(user, read) == 1):
                continue
            if turned(user) is False and source_of(user) is read:
                pending.append(user)
            else:
                return f"the bias {bias!r} is also read by {user.name} ({user.target})"
    return ""
