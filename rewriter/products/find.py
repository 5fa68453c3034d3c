"""The products of a graph: which node multiplies with which weight, and adds which bias.

The kinds look at every use of a parameter in turn. A use that is none of theirs, or uses that do not agree, are a
`NoMatch` with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from ..analysis.weight_views import is_fact, same_values, source_of, turned
from .convolution import match_convolution
from .embedding import match_embedding
from .linear import match_linear
from .match_contraction import match_contraction
from .product import Matcher, NoMatch, ProductNode, Use

#: every kind's look at a use of a weight, asked in this order
KINDS: tuple[Matcher, ...] = (match_linear, match_embedding, match_convolution, match_contraction)
#: the numbers of dimensions of the weights they know
DIMS = frozenset({2, 3, 4, 5})


def find_products(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, list[ProductNode] | NoMatch]:
    """For each parameter of `tensors` that may be a weight: its products, or the reason why it has none.

    All uses of a parameter must agree, on what is contracted and on the bias. One that is also used in another way (a
    norm, an embedding, a sum) is a `NoMatch`: an adapter on the product alone would not be what merging the weight
    computes.
    """
    return {name: _products_of(graph, name, tensors) for name, tensor in tensors.items() if tensor.dim() in DIMS}


def _products_of(graph: fx.Graph, name: str, tensors: Mapping[str, Tensor]) -> list[ProductNode] | NoMatch:
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
            turn = None
            if source_of(user) is view and len(user.all_input_nodes) <= 2:
                turn = turned(user) if tensors[name].dim() == 2 else False if same_values(user) else None
            if turn is None:
                uses[user] = origins[view]
            elif user not in views:
                views[user], origins[user] = views[view] != turn, origins[view]
                pending.append(user)
    found: list[ProductNode] = []
    for node in graph.nodes:
        if node in uses:
            use = Use(node, name, uses[node], views, tensors)
            match = next((match for kind in KINDS if (match := kind(use)) is not None), None)
            if match is None:
                return NoMatch(f"{node.op} {node.target} is not a linear product", node.name)
            if isinstance(match, NoMatch):
                return match
            found.append(match)
    if not found:
        return NoMatch(f"{name!r} is read but not used in a product")
    return _agreed(graph, found, tensors)


def _agreed(graph: fx.Graph, found: list[ProductNode], tensors: Mapping[str, Tensor]) -> list[ProductNode] | NoMatch:
    """The uses of one weight if they agree; the bias of `x @ W + b` counts only where it is the weight's own."""
    name = found[0].weight_name
    if len(kinds := sorted({type(use.product).__name__ for use in found})) > 1:
        return NoMatch(f"{name!r} is used in products of several kinds: {', '.join(kinds)}", found[-1].node.name)
    if len({use.product for use in found}) > 1:
        return NoMatch(f"{name!r} {found[0].product.several}", found[-1].node.name)
    biases = {use.bias_name for use in found}
    shared = next((why for b in biases if b is not None and (why := _also_read(graph, b, found, tensors))), "")
    if len(biases) == 1 and not shared and len({use.form == "matmul" for use in found if biases != {None}}) <= 1:
        return found
    if all(use.form == "matmul" for use in found):
        return [replace(use, bias_name=None) for use in found]
    return NoMatch(shared or f"{name!r} is used with different biases: {sorted(map(str, biases))}", found[-1].node.name)


def _times(user: fx.Node, node: fx.Node) -> int:
    return sum(value is node for value in [*user.args, *user.kwargs.values()])


def _also_read(graph: fx.Graph, bias: str, found: list[ProductNode], tensors: Mapping[str, Tensor]) -> str:
    """Who else reads a bias than the products of its weight; empty for nobody."""
    if any(tensor is tensors[bias] and other != bias for other, tensor in tensors.items()):
        return f"the bias {bias!r} has another name, and is read by it"
    own = {use.node if use.form != "matmul" else next(iter(use.node.users)) for use in found}
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
