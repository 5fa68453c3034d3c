"""Siblings: adapters that read the same input (q, k and v; gate and up) go down in one product.

    op(x, *a), op'(x, *b)   ->   z = go_down(x, [down(*a), down'(*b)]); up(z[0], *a), up'(z[1], *b)

`x` is read once instead of once per adapter, and goes down once where the adapters share what they go down with (VeRA's
A). The A of HydraLoRA and its router go along. Does not handle operators without halves (GLoRA), inputs that dropout
changes for one of them, nodes of which one depends on another, or nodes between which something writes what they read
or a mode (autocast, gradients) changes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...rewriter.analysis.dataflow import can_fuse, dependencies, siblings
from ...rewriter.analysis.memory import Memory, together
from ...rewriter.dialect import Halves, cast, is_dialect, reads
from ...rewriter.program import Pass, PassResult, Program, put
from ...rewriter.sites import NoMatch
from .cost import joined_down_pays
from .products import coarse, least_dimension, rows, split, value


@reads(fresh=True)
def go_down(x: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
    """`x F^T` for every factor `(q, in)`, as one product: x `(..., in)` -> `(..., q)` each."""
    joined = F.linear(x, cast(torch.cat(factors) if len(factors) > 1 else factors[0], x))
    return joined.split([factor.shape[0] for factor in factors], -1)


@dataclass(frozen=True)
class Siblings(Pass):
    """See the module's A -> B lines. Works in place.

    Args:
        always: leave the cost rule out.
    """

    always: bool = False

    def run(self, program: Program) -> PassResult:
        graph = program.graph
        found: dict[fx.Node, Any] = {}
        no_matches = []
        for node in graph.nodes:
            if is_dialect(node.target):
                parts = split(node)
                if isinstance(parts, NoMatch):
                    no_matches.append(parts)
                elif (reason := coarse(parts[1], parts[2], node)) is not None:
                    no_matches.append(reason)
                else:
                    found[node] = parts
        count = 0
        flow = dependencies(graph)
        memory = Memory(graph)

        def apart(run: list[fx.Node], node: fx.Node) -> NoMatch | None:
            _, x, arguments = found[node]
            reason = late(arguments, run[0]) or memory.changed((x, *arguments), run[0], node)
            no_matches.extend([reason] if reason else [])
            return reason

        runs = [
            run
            for group in siblings(graph, lambda node: found[node][1] if node in found else None)
            for run in together(group, apart)
        ]
        for nodes in runs:
            if len(nodes) == 1:
                continue
            reason = can_fuse(flow, nodes) or self._refused(program, nodes, found)
            if reason is not None:
                no_matches.append(reason)
                continue
            self._join(graph, nodes)
            count += len(nodes)
        return PassResult(program, count > 0, count, tuple(no_matches))

    def _refused(self, program: Program, nodes: list[fx.Node], found: dict[fx.Node, Any]) -> NoMatch | None:
        if self.always:
            return None
        x = found[nodes[0]][1]
        apart = {_read(*found[node]): node for node in nodes}
        if len(apart) == 1:
            return None  # one product in the place of several equal ones
        seen, ranks = value(x), sum(least_dimension(found[node][2]) for node in apart.values())
        inner, device = (int(seen.shape[-1]), seen.device.type) if seen is not None else (0, "cpu")
        verdict = joined_down_pays(rows(x), inner, ranks, len(nodes), device, program.training)
        return None if verdict else NoMatch(f"{len(nodes)} products stay apart: {verdict.reason}", nodes[0].name)

    def _join(self, graph: fx.Graph, nodes: list[fx.Node]) -> None:
        at = nodes[0]
        found: dict[fx.Node, Any] = {node: split(node) for node in nodes}  # as earlier groups left them
        bring(at, [a for n in nodes for a in found[n][2]])
        x = found[at][1]
        with graph.inserting_before(at):
            downs = {}
            for node in nodes:
                if (read := _read(*found[node])) not in downs:
                    downs[read] = graph.call_function(found[node][0].down, found[node][2])
            joined = graph.call_function(go_down, (x, list(downs.values())))
        for node in nodes:
            halves, _, arguments = found[node]
            with graph.inserting_before(node):
                z = graph.call_function(operator.getitem, (joined, list(downs).index(_read(*found[node]))))
                new = graph.call_function(halves.up, (z, *arguments))
            new.meta[HALVES] = halves
            put(new, node, type(self).__name__)


def _read(halves: Halves, x: fx.Node, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the down half of a node is made of: nodes in which that is the same have one."""
    return (halves.down, *(arguments if halves.reads is None else (arguments[i] for i in halves.reads)))


def late(values: Iterable[Any], at: fx.Node) -> NoMatch | None:
    """A value that is made behind a node and is neither a constant nor an item of what is made before it."""
    for node in values:
        if not isinstance(node, fx.Node) or node < at or node.op == "get_attr":
            continue
        if node.target is not operator.getitem or any(at < made for made in node.all_input_nodes):
            return NoMatch(f"{node.name} is made behind {at.name}", at.name)
    return None


def bring(at: fx.Node, values: Iterable[Any]) -> None:
    """Put those of these values that are read further down, and are not `late`, in front of a node."""
    for node in dict.fromkeys(v for v in values if isinstance(v, fx.Node) and at < v):
        at.prepend(node)


HALVES = "fxgraft_halves"  # in the meta of an up half: how the operator it came from splits
