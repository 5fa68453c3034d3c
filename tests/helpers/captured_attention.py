"""A small attention with adapters, captured; passes run over it one after the other; its graph as text."""

from __future__ import annotations

import torch
from methods import graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph import pipelines
from fxgraft.passes.graph.accumulate import Accumulate
from fxgraft.passes.graph.choose import Choose
from fxgraft.passes.graph.fold import Fold
from fxgraft.passes.graph.join_products import JoinProducts
from fxgraft.passes.graph.share import Share
from fxgraft.passes.graph.siblings import Siblings


class Attention(nn.Module):
    """Three linears on one input and one on the result; the output one without bias."""

    def __init__(self, inner: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(inner, n) for n in (8, 8, 6))
        self.out = nn.Linear(6, 10, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.q(x) * self.k(x)).sum(-1, keepdim=True) * self.v(x))


PASSES = {
    "share": (Share(),),
    "siblings": (Share(), Siblings(always=True)),
    "accumulate": (Share(), Accumulate(always=True)),
    "siblings, accumulate": (Share(), Siblings(always=True), Accumulate(always=True)),
    "choose": (Share(), Choose(always=True)),
    "fold": (Fold(),),
    "join": (JoinProducts(always=True),),
    "fold, join": (Fold(), JoinProducts(always=True)),
    "inference": pipelines.inference.passes,
    "training": pipelines.training.passes,
    "frozen": pipelines.frozen.passes,
}


def adapted(method, training=False, inner=12):
    model = Attention(inner).train(training)
    return perturb(graft(model, fg.Spec(method, targets=["q", "k", "v", "out"])), 0.3).train(training)


def captured(model, rows=5):
    return fg.capture(model, (torch.randn(rows, model.q.in_features),))


def run_all(program, passes):
    no_matches = []
    for step in passes:
        result = step(program)
        program = result.program
        no_matches += result.no_matches
    return program, no_matches


def printed(program):
    """The graph without placeholders and constants, one line a node."""
    lines = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        target = str(node.target) if not callable(node.target) else getattr(node.target, "__name__", str(node.target))
        target = str(node.target).removesuffix(".default") if "fxgraft." in str(node.target) else target
        lines.append(f"{node.name} = {target}({', '.join(map(str, node.args))})")
    return "\n".join(lines)
