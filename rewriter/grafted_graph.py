"""The graph of an owner with the dialect nodes of its adapters in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from .emitter import Emitter
from .errors import CaptureError
from .method import Method
from .products.find import find_products
from .products.opaque import opaque_product
from .sites import NoMatch, Site


def graft_graph(
    graph: fx.Graph, parameters: Mapping[str, torch.Tensor], adapters: Sequence[tuple[Site, Method, bool]]
) -> fx.Graph:
    """`y = linear(x, W, b)` -> `y = linear(x, W, b); y += fxgraft::<method>(x, ...)`, for each adapter in order.

    Where an adapter's third entry is true its delta is weighted. The graph it is given is not changed.
    """
    result = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copied)
    result.output(output)
    result.set_codegen(graph._codegen)
    opaque = opaque_product(result)
    found = find_products(result, parameters) if opaque is None else {"weight": [opaque]}
    replaced: dict[fx.Node, fx.Node] = {}

    def current(node: fx.Node) -> fx.Node:
        """What stands for a node of the base graph now: a product's sum with its adapters."""
        while node in replaced:
            node = replaced[node]
        return node

    for slot, (site, method, weighted) in enumerate(adapters):
        products = found.get(site.weight, NoMatch(f"no parameter {site.weight!r}"))
        if isinstance(products, NoMatch):
            raise CaptureError(f"{site.name!r} cannot be adapted: {products.reason}")
        for product in products:
            if product.product != site.product:
                raise CaptureError(
                    f"{site.name!r}: the product is another one than when the adapter was made, {product.product} and "
                    f"no longer {site.product}"
                )
            y = current(product.node)
            before = set(result.nodes)
            with result.inserting_before(y.next):
                new = method.emit(Emitter(result, site, current(product.x), y, slot, method.key, weighted))
            made = set(result.nodes) - before
            if new is not y:
                y.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)  # noqa: B023 (called at once)
                replaced[y] = new
    result.lint()
    return result
