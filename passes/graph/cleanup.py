"""Cleanup: what later passes should not have to look at.

    y += d                       ->  y + d                when y is new memory of d's dtype that only the sum sees
    dropout(x, p, False)         ->  x
    f(W); f(W)                   ->  f(W)                 reads of one tensor, and factors made of the same tensors
    a node nobody reads          ->  nothing              when it is known to do nothing else

Statements stay: what writes, draws random numbers, checks, switches a mode, or is not known. Does not handle sums into
a slice of y (parts of a fused weight): they stay as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from ...rewriter.analysis.effects import value
from ...rewriter.analysis.memory import Memory, erase_unread
from ...rewriter.dialect import traits_of
from ...rewriter.program import Pass, PassResult, Program, replace_meta

_DROPOUTS = {F.dropout, torch.dropout, torch.ops.aten.dropout.default}


@dataclass(frozen=True)
class Cleanup(Pass):
    """See the module's A -> B lines. Works in place."""

    def run(self, program: Program) -> PassResult:
        count = 0
        graph = program.graph
        memory = Memory(graph)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is operator.iadd and _is_a_sum(node, memory):
                with graph.inserting_before(node):
                    new = graph.call_function(operator.add, node.args)
                replace_meta(new, node, type(self).__name__)
                memory.stands(new, node)
            elif node.target in _DROPOUTS and _is_identity(node):
                new = node.args[0]
            else:
                continue
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            count += 1
        count += _drop_duplicates(graph, memory)
        count += erase_unread(graph)
        return PassResult(program, count > 0, count)


def _is_a_sum(node: fx.Node, memory: Memory) -> bool:
    """Whether nobody can tell `y += d` from `y + d`: no other reader or view of y, and no cast to y's dtype."""
    y, d = node.args
    if not isinstance(y, fx.Node) or not memory.private(y) or (was := value(y)) is None:
        return False
    if isinstance(d, (int, float)):
        return was.dtype.is_floating_point
    added = value(d)
    return added is not None and added.dtype == was.dtype and added.dim() <= was.dim()


def _drop_duplicates(graph: fx.Graph, memory: Memory) -> int:
    seen: dict[object, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            key: object = ("get_attr", node.target)
        elif node.op == "call_function" and traits_of(node.target).factor and not node.kwargs:
            key = (node.target, node.args)
        else:
            continue
        try:
            first = seen.setdefault(key, node)
        except TypeError:  # arguments that cannot be hashed, such as lists
            continue
        if first is not node and (node.op == "get_attr" or memory.changed(node.args, first, node) is None):
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
        else:
            seen[key] = node  # what is read from here on was written since
    return count


def _is_identity(node: fx.Node) -> bool:
    """Dropout in evaluation, or with probability 0. `F.dropout` defaults to training."""
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return training is False or (isinstance(p, (int, float)) and p == 0)
