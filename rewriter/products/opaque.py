"""The product of a layer that is not traced: one call in its owner's graph (`quantised/`)."""

from __future__ import annotations

from torch import fx

from ..quantised.quantised import BIAS, opaque_call
from .linear import LINEAR
from .product import ProductNode


def opaque_product(graph: fx.Graph) -> ProductNode | None:
    """The product of a quantised layer, whose weight is `(out, in)`; None in a graph of another kind of owner."""
    node = opaque_call(graph)
    if node is None:
        return None
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return ProductNode(node, x, node, "weight", LINEAR, node.meta[BIAS], "linear")
