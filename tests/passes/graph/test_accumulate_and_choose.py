"""`Accumulate` and `Choose`: products onto the base's and weights merged inside the graph, where that pays."""

from __future__ import annotations

import re

import torch
from captured_attention import adapted, captured, printed
from methods import METHODS
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph.accumulate import Accumulate
from fxgraft.passes.graph.choose import Choose
from fxgraft.passes.graph.siblings import Siblings

GOLDEN_ACCUMULATE = """\
lora_down = lora_down(q_fxgraft_default_a, q_fxgraft_default_b, 8.0)
_down_alone = _down_alone(x, lora_down)
lora_across = lora_across(q_fxgraft_default_a, q_fxgraft_default_b, 8.0)
onto = onto(x, q_weight, q_bias, _down_alone, lora_across, False)"""


def test_accumulate_prints():
    result = Accumulate(always=True)(captured(adapted(METHODS["lora"])))
    text = printed(result.program)
    assert result.count == 4 and text.count(" = onto(") == 4 and "linear" not in text and "fxgraft.lora" not in text
    assert "\n".join(text.splitlines()[:4]) == GOLDEN_ACCUMULATE
    assert "onto_3 = onto(mul_1, out_weight, None, _down_alone_3, lora_across_3, False)" in text


def test_accumulate_says_why_not():
    reasons = [n.reason for n in Accumulate()(captured(adapted(METHODS["lora"]))).no_matches]
    assert len(reasons) == 4 and all(r.startswith("the sum stays a pass of its own: 5 rows") for r in reasons)
    reasons = {n.reason for n in Accumulate(always=True)(captured(adapted(METHODS["hydralora"]))).no_matches}
    assert reasons == {"its up half is more than a product"}


def test_accumulate_leaves_shared_values_alone():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            y = self.a(x)
            return y, y + 1

    model = perturb(fg.rewrite(Read(), fg.Spec(fg.LoRA(2), targets=["a"])), 0.3)
    x = torch.randn(4, 12)
    want = model(x)
    program = Accumulate(always=True)(fg.capture(model, (x,))).program
    assert " = onto(" in printed(program)
    torch.testing.assert_close(program.graph_module(x), want)


def test_choose_by_cost():
    small = Choose()(captured(adapted(METHODS["lora"], inner=768), rows=2))
    assert small.no_matches
    assert all(re.search(r"products apart: 2 rows; .* pays from \d+ rows", n.reason) for n in small.no_matches)
    large = Choose()(captured(adapted(METHODS["lora"], inner=768), rows=1000))
    assert large.count == 4
    (node,) = [n for n in large.program.graph.nodes if n.name == "merged_linear"]
    assert re.search(r"1000 rows; merging inside the graph pays from \d+ rows up", node.meta["fxgraft"].reason)
    training = Choose(always=True)(captured(adapted(METHODS["lora"], training=True)))
    assert [n.reason for n in training.no_matches] == ["training: a merged weight needs a full weight gradient"]
    hydra = Choose(always=True)(captured(adapted(METHODS["hydralora"])))
    assert {n.reason for n in hydra.no_matches} == {"its up half is more than a product: there is no weight to merge"}
    half = fg.capture(adapted(METHODS["lora"]).bfloat16(), (torch.randn(5, 12, dtype=torch.bfloat16),))
    assert any("would round the delta away" in n.reason for n in Choose(always=True)(half).no_matches)


def test_choose_looks_at_symbolic_sizes():
    model = adapted(METHODS["lora"], inner=768)
    batch = torch.export.Dim("batch", min=2)
    program = fg.capture(model, (torch.randn(3, 768),), dynamic_shapes=({0: batch},))
    reasons = [n.reason for n in Choose()(program).no_matches]
    assert reasons and all("3 when captured" in r for r in reasons)


def test_accumulate_keeps_the_dropout():
    model = adapted(fg.LoRA(rank=2, dropout=0.5), training=True)
    x = torch.randn(5, 12)
    program = captured(model)
    for pipeline in ((Accumulate(always=True),), (Siblings(always=True), Accumulate(always=True))):
        made = program
        for step in pipeline:
            made = step(made).program
        torch.manual_seed(3)
        want = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(made.graph_module(x), want)
    assert " = onto(" in printed(program)
