"""Cleanup: what later passes should not have to look at.

    y += d                       ->  y + d                when y is a fresh product that only the sum reads
    dropout(x, p, False)         ->  x
    f(W); f(W)                   ->  f(W)                 reads of one tensor, and factors made of the same tensors
    a node nobody reads          ->  nothing

Does not handle sums into a slice of y (parts of a fused weight): they stay as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from ..rewriter.halves import is_pure
from ..rewriter.passbase import Pass, PassResult, Program, dead_code, replace_meta

_DROPOUTS = {F.dropout, torch.dropout, torch.ops.aten.dropout.default}


@dataclass(frozen=True)
class Cleanup(Pass):
    """See the module's A -> B lines. Works in place."""

    def run(self, program: Program) -> PassResult:
        count = 0
        graph = program.graph
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is operator.iadd and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1:
                with graph.inserting_before(node):
                    new = graph.call_function(operator.add, node.args)
                replace_meta(new, node, type(self).__name__)
            elif node.target in _DROPOUTS and _is_identity(node):
                new = node.args[0]
            else:
                continue
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            count += 1
        count += _drop_duplicates(graph)
        count += dead_code(program.graph_module)
        return PassResult(program, count > 0, count)


def _drop_duplicates(graph: fx.Graph) -> int:
    seen: dict[object, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            key: object = ("get_attr", node.target)
        elif node.op == "call_function" and is_pure(node.target) and not node.kwargs:
            key = (node.target, node.args)
        else:
            continue
        try:
            first = seen.setdefault(key, node)
        except TypeError:  # arguments that cannot be hashed, such as lists
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    return count


def _is_identity(node: fx.Node) -> bool:
    """Dropout in evaluation, or with probability 0. `F.dropout` defaults to training."""
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return training is False or (isinstance(p, (int, float)) and p == 0)
