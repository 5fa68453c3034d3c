"""Where the bias goes that a merged adapter adds to a product without one."""

from __future__ import annotations

from torch import Tensor, nn

from ..capture.trace import trace
from ..errors import CaptureError
from ..grafted_class import plain_view
from ..products.find import find_products
from ..quantised.quantised import quantised
from ..sites import NoMatch, Site


def bias_slot(owner: nn.Module, site: Site) -> str | None:
    """The empty parameter slot of an owner that its forward adds to this product, `bias` of `nn.Linear(bias=False)`.

    Proven on the owner's graph with the slot filled; None where there is none, as in a product with a bare parameter.
    """
    view = plain_view(owner)
    if quantised(view) is not None:  # merged it is a linear layer, which has one
        return "bias"
    weight = owner._parameters[site.weight]
    assert weight is not None
    for name, value in view._parameters.items():
        if value is not None:
            continue
        twin = type(view).__new__(type(view))
        filled = nn.Parameter(weight.new_empty(site.produced(weight), device="meta"), requires_grad=False)
        twin.__dict__ = {**view.__dict__, "_parameters": {**view._parameters, name: filled}}
        tensors: dict[str, Tensor] = {n: p for n, p in twin._parameters.items() if p is not None}
        try:
            products = find_products(trace(twin).graph, tensors)[site.weight]
        except CaptureError:
            continue
        if not isinstance(products, NoMatch) and all(product.bias_name == name for product in products):
            return name
    return None
