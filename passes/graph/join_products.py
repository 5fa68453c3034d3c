"""JoinProducts: frozen base products that read the same input become one.

    linear(x, Wq, bq), linear(x, Wk, bk), ...   ->   q, k, ... = split(linear(x, [Wq; Wk; ...], [bq; bk; ...]))

For programs that own their tensors (`fg.capture`), in inference: the joined weight takes the place of the others, which
go when nobody else reads them. Weights that are given at every call (`fg.compile`) would have to be joined at every
call, and are left. So are swappable ones, quantised ones, those that the graph writes, products of an input that is
written in between, and products that `Accumulate` or `Choose` has taken: these hold an adapter's sum, which saves more.
The model the program was captured from keeps its own weights, so both in memory at once are a copy: drop the model.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...rewriter.analysis.dataflow import can_fuse, dependencies, siblings
from ...rewriter.analysis.effects import effect, value
from ...rewriter.analysis.memory import Memory, erase_unread, together
from ...rewriter.program import Pass, PassResult, Program, put, replace_meta
from ...rewriter.sites import NoMatch
from .constants import Constants, drop_unused, free_place
from .cost import joined_product_pays
from .products import Product, product, rows


@dataclass(frozen=True)
class JoinProducts(Pass):
    """See the module's A -> B lines. Not in place: the given program keeps its tensors.

    Args:
        swappable: names of tensors that stay as they are, as in `Fold`.
        always: leave the cost rule out.
    """

    swappable: tuple[str, ...] = ()
    always: bool = False

    in_place = False
    not_in_training = "the weights may still change"

    def run(self, program: Program) -> PassResult:
        graph, memory = program.graph, Memory(program.graph)
        values = Constants(program.graph_module, self.swappable, memory)
        found: dict[fx.Node, tuple[Product, Tensor, Tensor | None]] = {}
        no_matches: list[NoMatch] = []
        for node in graph.nodes:
            base = product(node)
            if isinstance(base, NoMatch):
                continue
            known = values.all((base.weight, base.bias), node)
            if isinstance(known, NoMatch):
                no_matches.append(known)
            else:
                found[node] = (base, *known)
        count, flow = 0, dependencies(graph)

        def apart(run: list[fx.Node], node: fx.Node) -> NoMatch | None:
            reason = memory.changed((found[node][0].x,), run[0], node)
            no_matches.extend([reason] if reason else [])
            return reason

        for readers in siblings(graph, lambda node: found[node][0].x if node in found else None):
            alike: dict[Any, list[fx.Node]] = defaultdict(list)
            for node in readers:
                base, weight, _ = found[node]
                alike[type(weight).__name__, weight.dtype, weight.device, base.transposed].append(node)
            runs = [run for group in alike.values() for run in together(group, apart)]
            for nodes in runs:
                reason = self._refused(flow, nodes, found)
                if reason is not None:
                    no_matches.append(reason)
                    continue
                self._join(program, nodes, found)
                count += len(nodes)
        if count:
            erase_unread(graph)
            drop_unused(program.graph_module)
        return PassResult(program, count > 0, count, tuple(no_matches))

    def _refused(self, flow: Any, nodes: list[fx.Node], found: dict[fx.Node, Any]) -> NoMatch | None:
        if len(nodes) < 2:
            return NoMatch("no other product of its kind reads the same input", nodes[0].name)
        base, weight, _ = found[nodes[0]]
        if type(weight) not in (Tensor, torch.nn.Parameter) or not weight.dtype.is_floating_point:
            return NoMatch(f"a {type(weight).__name__} of {weight.dtype} is no plain matrix", nodes[0].name)
        if (reason := can_fuse(flow, nodes)) is not None:
            return reason
        width = sum(int(found[node][1].shape[1 if base.transposed else 0]) for node in nodes)
        for node in nodes:
            if (reason := _needs_its_layout(node, width)) is not None:
                return reason
        verdict = joined_product_pays(rows(base.x), len(nodes), weight.device.type)
        if not (verdict or self.always):
            return NoMatch(f"{len(nodes)} base products stay apart: {verdict.reason}", nodes[0].name)
        return None

    def _join(self, program: Program, nodes: list[fx.Node], found: dict[fx.Node, Any]) -> None:
        module, graph = program.graph_module, program.graph
        products: list[Any] = [product(node) for node in nodes]  # as earlier joins left them
        weights: list[Tensor] = [found[node][1].detach() for node in nodes]
        biases = [found[node][2] for node in nodes]
        along = 1 if products[0].transposed else 0
        sizes = [weight.shape[along] for weight in weights]
        place = free_place(module, "joined_weight")
        module.register_buffer(f"joined_weight_{place}", torch.cat(weights, along))
        if any(bias is not None for bias in biases):
            whole = [
                w.new_zeros(n) if b is None else b.detach() for b, w, n in zip(biases, weights, sizes, strict=True)
            ]
            module.register_buffer(f"joined_bias_{place}", torch.cat(whole))
        at = nodes[0]
        with graph.inserting_before(at):
            weight = graph.get_attr(f"joined_weight_{place}")
            bias = graph.get_attr(f"joined_bias_{place}") if hasattr(module, f"joined_bias_{place}") else None
            if not products[0].transposed:
                whole_product = graph.call_function(torch.ops.aten.linear.default, (products[0].x, weight, bias))
            elif bias is None:
                whole_product = graph.call_function(torch.ops.aten.mm.default, (products[0].x, weight))
            else:
                whole_product = graph.call_function(torch.ops.aten.addmm.default, (bias, products[0].x, weight))
            replace_meta(whole_product, at, type(self).__name__, f"{len(nodes)} products")
            # What was recorded of the first product is not true of them all.
            for key in ("val", "example_value", "tensor_meta"):
                whole_product.meta.pop(key, None)
            parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (whole_product, sizes, -1))
        for index, node in enumerate(nodes):
            with graph.inserting_before(node):
                part = graph.call_function(operator.getitem, (parts, index))
            put(part, node, type(self).__name__)


def _needs_its_layout(node: fx.Node, width: int) -> NoMatch | None:
    """Why a product's result may not be a slice of rows that are `width` wide: something looks at it as at a block.

    What is made of it without a copy is made once more of such a slice, on fake tensors.
    """
    seen = value(node)
    mode = getattr(seen, "fake_mode", None)
    if seen is None or mode is None:
        return NoMatch("nothing is recorded of its result", node.name)
    with mode:
        waiting: list[tuple[fx.Node, Any]] = [(node, seen.new_empty((*seen.shape[:-1], width))[..., : seen.shape[-1]])]
        while waiting:
            part, fake = waiting.pop()
            for user in part.users:
                if user.op == "output" or part not in effect(user).shares:
                    continue
                reason = NoMatch(f"{user.name} needs {node.name} in a block of its own", node.name)
                if user.op != "call_function" or effect(user).fixed or "as_strided" in str(user.target):
                    return reason
                try:
                    waiting.append((user, _called(user, {part: fake})))
                except (RuntimeError, ValueError):  # what torch says of a view that cannot be
                    return reason
    return None


def _called(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The result of a node for these values, and what is recorded where none is given."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta.get("val")))
    return node.target(*args, **kwargs)  # type: ignore[operator]
