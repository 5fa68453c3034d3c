"""`Share` and `Siblings`: one gather, one product of a common input, and the reason wherever they do nothing."""

from __future__ import annotations

import re

import torch
from captured_attention import Attention, adapted, captured, printed, run_all
from methods import METHODS
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph import pipelines
from fxgraft.passes.graph.cleanup import Cleanup
from fxgraft.passes.graph.share import Share
from fxgraft.passes.graph.siblings import Siblings


def test_share_prints_one_gather():
    program, _ = run_all(captured(adapted(METHODS["unilora"])), (Cleanup(), Share()))
    text = printed(program)
    assert text.count(" = all_factors(") == 1 and "fxgraft.unilora(" not in text
    assert text.count("fxgraft.unilora_factors(") == 4
    lone = fg.rewrite(Attention(), fg.Spec(fg.UniLoRA(rank=2, vector_length=9), targets=["q"]))
    assert [n.reason for n in Share()(captured(lone)).no_matches] == ["no other node reads the same tensors"]
    reasons = [n.reason for n in Share()(captured(adapted(METHODS["lora"]))).no_matches]
    assert len(reasons) == 4 and all("nothing to share" in reason for reason in reasons)


def test_the_unilora_gradient_is_one_sum():
    model = adapted(METHODS["unilora"], training=True)
    program, _ = run_all(captured(model), pipelines.training.passes)
    graph = program.graph_module(torch.randn(5, 12)).sum().grad_fn
    names, waiting = [], [graph]
    while waiting:
        node = waiting.pop()
        if node is None or node in names:
            continue
        names.append(node)
        waiting += [f for f, _ in node.next_functions]
    kinds = [type(n).__name__ for n in names]
    assert kinds.count("_GatherAllBackward") == 1 and "IndexSelectBackward0" not in kinds


GOLDEN_SIBLINGS = """\
lora_down = lora_down(q_fxgraft_default_a, q_fxgraft_default_b, 8.0)
lora_down_1 = lora_down(k_fxgraft_default_a, k_fxgraft_default_b, 8.0)
lora_down_2 = lora_down(v_fxgraft_default_a, v_fxgraft_default_b, 8.0)
go_down = go_down(x, [lora_down, lora_down_1, lora_down_2])
getitem = getitem(go_down, 0)
lora_up = lora_up(getitem, q_fxgraft_default_a, q_fxgraft_default_b, 8.0)
getitem_1 = getitem(go_down, 1)
lora_up_1 = lora_up(getitem_1, k_fxgraft_default_a, k_fxgraft_default_b, 8.0)
getitem_2 = getitem(go_down, 2)
lora_up_2 = lora_up(getitem_2, v_fxgraft_default_a, v_fxgraft_default_b, 8.0)
lora_3 = fxgraft.lora(mul_1, out_fxgraft_default_a, out_fxgraft_default_b, 8.0)"""


def test_siblings_print():
    result = Siblings(always=True)(captured(adapted(METHODS["lora"])))
    assert result.count == 3
    lines = printed(result.program).splitlines()
    ours = [line for line in lines if re.search("lora|go_down", line) and "add" not in line]
    assert "\n".join(ours) == GOLDEN_SIBLINGS
    ups = [n for n in result.program.graph.nodes if n.name.startswith("lora_up")]
    assert all(n.meta["fxgraft"].made_by == "Siblings" for n in ups)


def test_siblings_behind_shared_factors():
    """What `Share` hands to a node stands right in front of it: it is brought forward with the product."""
    program, _ = run_all(captured(adapted(METHODS["unilora"])), (Share(), Siblings(always=True)))
    assert printed(program).count(" = go_down(") == 1 and printed(program).count("_gathered_a(") == 3


def test_siblings_say_why_not():
    (reason,) = Siblings()(captured(adapted(fg.LoRA(rank=6), inner=768), rows=2)).no_matches
    assert re.search(r"3 products stay apart: 2 rows; saves \d+ us and costs \d+", reason.reason)
    reasons = {n.reason for n in Siblings()(captured(adapted(METHODS["glora"]))).no_matches}
    assert reasons == {"fxgraft.glora.default is no low-rank operator"}
    model = adapted(fg.HydraLoRA(rank=2, experts=3, dropout=0.5), training=True)
    assert any("more than one input" in n.reason for n in Siblings(always=True)(captured(model)).no_matches)

    class Chain(nn.Module):
        """The second adapter's tensors do not depend on the first, but its input does: no siblings at all."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.b(self.a(x))

    chain = fg.rewrite(Chain(), fg.Spec(fg.LoRA(2), targets=["a", "b"]))
    assert not Siblings(always=True)(fg.capture(chain, (torch.randn(5, 12),))).modified
