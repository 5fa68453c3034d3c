"""Fold: what cannot change any more becomes constants.

    op(x, *constants)                        ->   lora(x, A, B, 1.0)       projections, B R, alpha: two plain factors
    linear(x, W, b) + glora(x, ..., fixed)   ->   linear(x, W', b')        a fixed path goes into weight and bias
    f(constants)                             ->   its value                where an adapter reads it

Runs on programs that own their tensors (`fg.capture`). Tensors in `swappable` are never folded, nor is anything that
depends on them, or on a tensor that the graph writes. Does not handle operators whose delta depends on the input
otherwise than by a product (HydraLoRA), and weights too narrow to take a delta in without rounding it away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...rewriter.analysis.effects import value
from ...rewriter.analysis.memory import Memory, erase_unread
from ...rewriter.dialect import is_dialect, traits_of
from ...rewriter.program import Pass, PassResult, Program, put
from ...rewriter.sites import NoMatch
from ..methods.lora import lora
from .constants import Constants, by_itself, drop_unused, free_place
from .products import one_product, split, summed


@dataclass(frozen=True)
class Fold(Pass):
    """See the module's A -> B lines. Not in place: the given program keeps its tensors.

    Args:
        swappable: names of tensors that stay as they are, as in `Spec.targets` (globs, `re:`, endings).
    """

    swappable: tuple[str, ...] = ()

    in_place = False

    def run(self, program: Program) -> PassResult:
        memory = Memory(program.graph)
        values = Constants(program.graph_module, self.swappable, memory)
        count, no_matches = 0, []
        for node in list(program.graph.nodes):
            if not is_dialect(node.target):
                continue
            if traits_of(node.target).weight_form is None:
                result = self._factors(program, memory, node, values)
            else:
                result = self._weight(program, memory, node, values)
            if isinstance(result, NoMatch):
                no_matches.append(result)
            else:
                count += 1
        if count:
            erase_unread(program.graph)
            drop_unused(program.graph_module)
        return PassResult(program, count > 0, count, tuple(no_matches))

    def _factors(self, program: Program, memory: Memory, node: fx.Node, values: Constants) -> NoMatch | None:
        parts = split(node)
        if isinstance(parts, NoMatch):
            return parts
        halves, x, arguments = parts
        if halves.across is None:
            return NoMatch("its up half is more than a product", node.name)
        known = values.all(arguments, node)
        if isinstance(known, NoMatch):
            return known
        if node.target is lora and arguments[-1] == 1:
            return NoMatch("two plain factors already", node.name)
        with by_itself():
            known = _widened(known, value(x))
            A, B = halves.down(*known), halves.across(*known)
        self._replace(program, memory, node, lora, x, (A, B), 1.0)
        return None

    def _weight(self, program: Program, memory: Memory, node: fx.Node, values: Constants) -> NoMatch | None:
        weight_form = traits_of(node.target).weight_form
        assert weight_form is not None
        known = values.all(node.args[2:], node)  # behind x and the base's product
        if isinstance(known, NoMatch):
            return known
        x: Any = node.args[0]
        base = None
        with by_itself():
            weight, bias = weight_form(*_widened(known, value(x)))
        given, result = value(x), value(node)
        if weight.dtype.itemsize < 4 or any(t is not None and t.dtype != weight.dtype for t in (given, result)):
            return NoMatch(f"a {weight.dtype} weight, or a product in less, would round the delta away", node.name)
        user = next(iter(node.users), node)
        if len(node.users) == 1 and not isinstance(found := summed(user), NoMatch):
            product, delta = found
            total = values.all((product.weight, product.bias), node)
            refused = one_product(memory, user, product, delta, x, ())
            if delta is node and product.x is x and not isinstance(total, NoMatch) and refused is None:
                base = user
                with by_itself():
                    weight = weight + (total[0].t() if product.transposed else total[0])
                    bias = bias if total[1] is None else total[1] if bias is None else bias + total[1]
        self._replace(program, memory, base or node, F.linear, x, (weight, bias))
        return None

    def _replace(
        self,
        program: Program,
        memory: Memory,
        node: fx.Node,
        target: Any,
        x: Any,
        tensors: tuple[Tensor | None, ...],
        *rest: Any,
    ) -> None:
        module, graph = program.graph_module, program.graph
        reads: list[fx.Node | None] = []
        with graph.inserting_before(node):
            for tensor in tensors:
                if tensor is None:
                    reads.append(None)
                    continue
                name = f"folded_{free_place(module, 'folded')}"
                module.register_buffer(name, tensor.detach().contiguous())
                reads.append(graph.get_attr(name))
            new = graph.call_function(target, (x, *reads, *rest))
        memory.stands(new, node)
        put(new, node, type(self).__name__)


def _widened(known: list[Any], like: Tensor | None) -> list[Any]:
    """The tensors in the dtype of the input where theirs is coarser: the operator casts before it multiplies."""

    def wide(tensor: Any) -> Any:
        if like is None or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, like.dtype))

    return [wide(tensor) for tensor in known]
