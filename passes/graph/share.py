"""Share: what several adapter nodes compute alike is computed once for the whole graph.

    unilora(x, theta, counts, ia, ib), unilora(y, theta, counts, ja, jb), ...
        ->  f = all_factors(theta, counts, [ia, ib, ja, jb, ...]); unilora_factors(x, f[0], f[1]), ...

The vector is scaled once, and its gradient is one sum over the projection instead of one scatter per gather. Rotated
chunks and other factors that the same module reads at several calls are shared by `Cleanup`, which drops duplicates.
Does not handle an operator that has registered nothing to share, that stands in the graph once, or between whose
nodes something writes the shared tensors or switches a mode (autocast, gradients).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...rewriter.analysis.memory import Memory, together
from ...rewriter.dialect import Common, is_dialect, traits_of
from ...rewriter.program import Pass, PassResult, Program, put
from ...rewriter.sites import NoMatch
from .siblings import bring, late


@dataclass(frozen=True)
class Share(Pass):
    """See the module's A -> B lines. Works in place."""

    def run(self, program: Program) -> PassResult:
        groups: dict[tuple[Common, tuple[Any, ...]], list[fx.Node]] = defaultdict(list)
        no_matches = []
        for node in program.graph.nodes:
            if not is_dialect(node.target):
                continue
            how = traits_of(node.target).common
            if how is None:
                no_matches.append(NoMatch(f"{node.target} has nothing to share between nodes", node.name))
            elif node.kwargs:
                no_matches.append(NoMatch("keyword arguments", node.name))
            else:
                groups[how, node.args[1 : 1 + how.shared]].append(node)
        count, memory = 0, Memory(program.graph)

        def apart(run: list[fx.Node], node: fx.Node) -> NoMatch | None:
            reason = late(node.args[1:], run[0]) or memory.changed(node.args[1:], run[0], node)
            no_matches.extend([reason] if reason else [])
            return reason

        runs = [(how, shared, run) for (how, shared), group in groups.items() for run in together(group, apart)]
        for how, shared, nodes in runs:
            if memory.transformed(nodes[0]):
                no_matches.append(NoMatch("its function has no rule for vmap", nodes[0].name))
                continue
            if len(nodes) == 1:
                no_matches.append(NoMatch("no other node reads the same tensors", nodes[0].name))
                continue
            self._share(program.graph, how, shared, nodes)
            count += len(nodes)
        return PassResult(program, count > 0, count, tuple(no_matches))

    def _share(self, graph: fx.Graph, how: Common, shared: tuple[Any, ...], nodes: list[fx.Node]) -> None:
        own = [node.args[1 + how.shared :] for node in nodes]
        arguments = [argument for arguments in own for argument in arguments]
        at = nodes[0]
        bring(at, (*shared, *arguments))
        with graph.inserting_before(at):
            made = graph.call_function(how.function, (*shared, arguments))
        place = 0
        for node, mine in zip(nodes, own, strict=True):
            with graph.inserting_before(node):
                parts = [graph.call_function(operator.getitem, (made, place + i)) for i in range(len(mine))]
                new = graph.call_function(how.replacement, (node.args[0], *parts))
            put(new, node, type(self).__name__)
            place += len(mine)
