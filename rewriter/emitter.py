"""What a method sees of one site while it inserts its operator into the owner's graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .calls.call_values import current
from .dialect import cast, halves_of, is_dialect, traits_of
from .errors import SpecError
from .parts import Rows
from .quantised.quantised import WEIGHT_OF, opaque_call
from .sites import Site

SLOT = "fxgraft_slot"  # plain attribute of an owner: the active adapter's tensors
WEIGHT = "fxgraft_weight"  # plain attribute of an owner: what the delta of a slot is multiplied with, if not 1
PROVENANCE = "fxgraft"  # key in node.meta
_WRITTEN = "fxgraft_written"  # key in the meta of a view of an output: the rows an adapter adds to


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
        return y + cast(delta, y)  # of a product without an input of values the delta has the adapter's dtype
    y += delta
    return y


class Emitter:
    """What a method sees of one site while it inserts its operator.

    Attributes:
        graph: the graph being edited; the insertion point is right behind the site's product.
        site: the site; method: the method's key, for the provenance of nodes.
        x: the input, `(..., in)` of a plain product; y: the output so far, `(..., out)` there, of this site's part.
        weighted: the delta is multiplied by a weight in `add`; such an adapter cannot take the product's place.
    """

    def __init__(
        self, graph: fx.Graph, site: Site, x: fx.Node, y: fx.Node, slot: int, method: str, weighted: bool = False
    ) -> None:
        self.graph, self.site, self.x, self.weighted = graph, site, x, weighted
        self._output, self._slot, self._rows = y, slot, site.rows
        self._provenance = Provenance("graft", site.name, method)

    def _mark(self, node: fx.Node) -> fx.Node:
        node.meta[PROVENANCE] = self._provenance
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator or a function.

        An operator of the dialect takes x first and gives the delta. Where the product is not plain it stands there
        as its halves, or on the rows of x.

        Raises:
            SpecError: it has no halves, and the product no rows.
        """
        if not self.site.product.plain and (is_dialect(target) or halves_of(target) is not None):
            return self._beside(target, args)
        return self.function(target, *args, **kwargs)

    def function(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, as it is."""
        return self._mark(self.graph.call_function(target, args, kwargs))

    def _beside(self, target: Any, args: Sequence[Any]) -> fx.Node:
        """`op(x, *rest)` -> `up(product(x, down(*rest)), *rest)` -> the delta in the layout of the product's result."""
        product, halves = self.site.product, halves_of(target)
        inputs = 1 if halves is None else halves.inputs
        x, rest = args[0], args[inputs:]
        if halves is not None and not product.by_rows and all(given is x for given in args[:inputs]):
            z = product.down(self.function, x, self.function(halves.down, *rest))
            if halves.across is not None:
                return product.up(self.function, z, self.function(halves.across, *rest))
            return product.unrolled(self.function, self.function(halves.up, product.last(self.function, z), *rest))
        amounts_to = traits_of(target).weight_form  # of the arguments behind x and the product
        if amounts_to is not None and product.takes_weights:
            return product.by_weight(self.function, x, self.function(amounts_to, *args[2:]))
        rows = [self.rows(given) for given in args[:inputs]]
        return self.unrolled(self.function(target, *rows, *rest))

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
    def output(self) -> fx.Node:
        """The product's whole output so far, of all parts."""
        return self._output

    @property
    def y(self) -> fx.Node:
        return (
            self._output
            if self._rows is None
            else self._rows.take(self._output, self.site.product.channel, self.function)
        )

    @property
    def untouched(self) -> bool:
        """Whether `y` is still the base's product: no adapter before this one has added to these rows."""

        def written(view: fx.Node) -> bool:
            rows: Rows | None = view.meta.get(_WRITTEN)
            return rows is not None and (self._rows is None or rows.meets(self._rows))

        return PROVENANCE not in self._output.meta and not any(map(written, self._output.users))

    def weight(self) -> fx.Node:
        """The base weight of this site in linear layout `(out, in)`."""
        if opaque_call(self.graph) is not None:
            node = self._mark(self.graph.call_module(WEIGHT_OF))
        else:
            node = self._mark(self.graph.get_attr(self.site.weight))
        node = self.site.product.matrix_node(self.function, node)
        return node if self._rows is None else self._rows.take(node, -2, self.function)

    def bias(self) -> fx.Node | None:
        """The base bias `(out,)` of this site, or None."""
        if self.site.bias is None:
            return None
        node = self._mark(self.graph.get_attr(self.site.bias))
        return node if self._rows is None else self._rows.take(node, -1, self.function)

    def delta_weight(self) -> fx.Node:
        """What the delta is multiplied with, if that is not 1."""
        return self._mark(self.graph.get_attr(f"{WEIGHT}{self._slot}"))

    def rows(self, x: fx.Node) -> fx.Node:
        """x as the rows `(..., in)` that the weight multiplies.

        Raises:
            SpecError: the product has none.
        """
        if self.site.product.plain:
            return x
        rows = self.site.product.rows(self.function, x)
        if rows is None:
            raise SpecError(
                f"{self.site.name!r} cannot be adapted: {self.site.product.refusal(self._provenance.method)}"
            )
        return rows

    def unrolled(self, delta: fx.Node) -> fx.Node:
        """The delta of rows, `(..., out)`, as `add` takes it."""
        return self.site.product.unrolled(self.function, delta)

    def training(self) -> fx.Node:
        """The owner's mode, as a value: True in training."""
        return self._mark(self.graph.get_attr("training"))

    def dropped(self, p: float) -> fx.Node:
        """The input with dropout `p` in training; the input itself for `p = 0` and where it has no values to drop."""
        if p == 0 or self.site.product.one_hot:
            return self.x
        return self.call(F.dropout, self.x, p, self.training())

    def add(self, delta: fx.Node) -> fx.Node:
        """`y + delta`, or `y + weight * delta`."""
        if self.weighted:
            delta = self.call(torch.mul, delta, self.delta_weight())
        if self._rows is None:
            return self.call(add_delta, self._output, delta)
        # The sum is read through the whole output only: an operator whose schema says that it writes survives cleanup.
        dim = self.site.product.channel
        blocks = self._rows.blocks(self._output, dim, self.function)
        for view in (blocks, *blocks.all_input_nodes):
            if self._output in view.all_input_nodes:
                view.meta[_WRITTEN] = self._rows
        self.function(torch.ops.aten.add_.Tensor, blocks, self._rows.split(delta, dim, self.function))
        return self._output
