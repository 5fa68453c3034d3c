"""What a method sees of one site while it inserts its operator into the owner's graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .calls.call_values import current
from .sites import Site

SLOT = "fxgraft_slot"  # plain attribute of an owner: the active adapter's tensors
WEIGHT = "fxgraft_weight"  # plain attribute of an owner: what the delta of a slot is multiplied with, if not 1
PROVENANCE = "fxgraft"  # key in node.meta


@dataclass(frozen=True)
class Provenance:
    """Which pass made a node, for which site and method, and why it chose so."""

    made_by: str
    site: str
    method: str
    reason: str = ""


def add_delta(y: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`y + delta` for a product's fresh result that nobody else reads: in place where no gradient flows.

    In training the sum is a new tensor: a linear's result is a view of a 2-d product, and autograd pays for a write
    into a view with a copy of the gradient.
    """
    if y.requires_grad or delta.requires_grad:
        return y + delta
    y += delta
    return y


class Emitter:
    """What a method sees of one site while it inserts its operator.

    Attributes:
        graph: the graph being edited; the insertion point is right behind the site's product.
        site: the site; method: the method's key, for the provenance of nodes.
        x: the input `(..., in)`; y: the output so far `(..., out)` of this site's part.
        weighted: the delta is multiplied by a weight in `add`; such an adapter cannot take the product's place.
    """

    def __init__(
        self, graph: fx.Graph, site: Site, x: fx.Node, y: fx.Node, slot: int, method: str, weighted: bool = False
    ) -> None:
        self.graph, self.site, self.x, self.weighted = graph, site, x, weighted
        self._output, self._slot = y, slot
        self._provenance = Provenance("graft", site.name, method)

    def _mark(self, node: fx.Node) -> fx.Node:
        node.meta[PROVENANCE] = self._provenance
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator or a function."""
        return self._mark(self.graph.call_function(target, args, kwargs))

    def tensor(self, name: str) -> fx.Node:
        """A tensor of this site."""
        return self._mark(self.graph.get_attr(f"{SLOT}{self._slot}.{name}"))

    def shared(self, name: str) -> fx.Node:
        """A tensor the sites of the adapter share."""
        return self._mark(self.graph.get_attr(f"{SLOT}{self._slot}.shared.{name}"))

    def given(self, name: str) -> fx.Node:
        """What the call brings for the method, one of `Method.inputs`."""
        return self.call(current, name)

    @property
    def y(self) -> fx.Node:
        if self.site.whole:
            return self._output
        return self.call(torch.narrow, self._output, -1, self.site.offset, self.site.out_features)

    def weight(self) -> fx.Node:
        """The base weight of this site in linear layout `(out, in)`."""
        node = self._mark(self.graph.get_attr(self.site.weight))
        if self.site.contracted == 0:
            node = self.call(torch.t, node)
        if not self.site.whole:
            node = self.call(torch.narrow, node, 0, self.site.offset, self.site.out_features)
        return node

    def bias(self) -> fx.Node | None:
        """The base bias `(out,)` of this site, or None."""
        if self.site.bias is None:
            return None
        node = self._mark(self.graph.get_attr(self.site.bias))
        return node if self.site.whole else self.call(torch.narrow, node, 0, self.site.offset, self.site.out_features)

    def training(self) -> fx.Node:
        """The owner's mode, as a value: True in training."""
        return self._mark(self.graph.get_attr("training"))

    def dropped(self, p: float) -> fx.Node:
        """The input with dropout `p` in training; the input itself for `p = 0`."""
        if p == 0:
            return self.x
        return self.call(F.dropout, self.x, p, self.training())

    def add(self, delta: fx.Node) -> fx.Node:
        """`y + delta`, or `y + weight * delta`."""
        if self.weighted:
            delta = self.call(torch.mul, delta, self._mark(self.graph.get_attr(f"{WEIGHT}{self._slot}")))
        if self.site.whole:
            return self.call(add_delta, self._output, delta)
        # The sum is read through the whole output only: an operator whose schema says that it writes survives cleanup.
        self.call(torch.ops.aten.add_.Tensor, self.y, delta)
        return self._output
