"""Choose: the form of each adapter that the cost rule finds cheapest for the rows the graph runs with.

    linear(x, W, b) + op(x, *a)   ->   merged_linear(x, W, b, down(*a), across(*a))     (W + B A) made at every call

The tensors stay inputs of the graph, so the adapter stays swappable; one weight at a time is made anew and dropped.
Inference only: in training the gradient of the sum would be a full weight gradient. Only for products in float32 and
wider, because a narrower sum, also one that autocast makes narrower, would round the delta away. What is left keeps its
products apart, `(x A) B`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...rewriter.analysis.memory import Memory
from ...rewriter.dialect import is_dialect, reads
from ...rewriter.program import Pass, PassResult, Program, put
from ...rewriter.sites import NoMatch
from .cost import inline_merge_pays
from .products import Product, least_dimension, one_product, rows, split, summed, value


@reads(fresh=True)
def merged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, across: Tensor, transposed: bool
) -> Tensor:
    """`x (W + across down)^T + bias`: weight `(out, in)`, or `(in, out)` if transposed; down `(r, in)`, across
    `(out, r)`."""
    weight = weight.t() if transposed else weight
    return F.linear(x, torch.addmm(weight, across.to(weight.dtype), down.to(weight.dtype)), bias)


@dataclass(frozen=True)
class Choose(Pass):
    """See the module's A -> B lines. Works in place.

    Args:
        always: merge wherever it is legal, whatever the cost rule says.
    """

    always: bool = False

    not_in_training = "a merged weight needs a full weight gradient"

    def run(self, program: Program) -> PassResult:
        count, no_matches = 0, []
        memory = Memory(program.graph)
        for node in list(program.graph.nodes):
            found = summed(node)
            if isinstance(found, NoMatch) or not is_dialect(found[1].target):
                continue
            reason = self._merge(program.graph, memory, node, *found)
            if reason is None:
                count += 1
            else:
                no_matches.append(reason)
        return PassResult(program, count > 0, count, tuple(no_matches))

    def _merge(self, graph: fx.Graph, memory: Memory, node: fx.Node, base: Product, delta: fx.Node) -> NoMatch | None:
        parts = split(delta)
        if isinstance(parts, NoMatch):
            return parts
        halves, x, arguments = parts
        if halves.across is None:
            return NoMatch("its up half is more than a product: there is no weight to merge", delta.name)
        if x is not base.x:
            return NoMatch("the adapter does not read the product's input", delta.name)
        weight = value(base.weight)
        if weight is None:
            return NoMatch("nothing is known of the base weight", delta.name)
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 4 or type(weight).__name__.startswith("Quant"):
            return NoMatch(f"a {weight.dtype} weight would round the delta away", delta.name)
        if (reason := one_product(memory, node, base, delta, x, arguments)) is not None:
            return reason
        out, inner = reversed(weight.shape) if base.transposed else weight.shape
        verdict = inline_merge_pays(rows(x), int(out), int(inner), least_dimension(arguments), weight.device.type)
        if not (verdict or self.always):
            return NoMatch(f"products apart: {verdict.reason}", delta.name)
        with graph.inserting_before(node):
            down, across = graph.call_function(halves.down, arguments), graph.call_function(halves.across, arguments)
            new = graph.call_function(merged_linear, (x, base.weight, base.bias, down, across, base.transposed))
        memory.stands(new, node)
        put(new, node, type(self).__name__, verdict.reason)
        for old in (delta, base.node):
            graph.erase_node(old)
        return None
