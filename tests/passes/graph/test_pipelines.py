"""Every pass and pipeline over every method: numbers and gradients stay, and nothing moves across a write."""

from __future__ import annotations

import copy

import pytest
import torch
from captured_attention import PASSES, adapted, captured, printed, run_all
from methods import FIXED, METHODS
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph import pipelines
from fxgraft.passes.graph.accumulate import Accumulate
from fxgraft.passes.graph.choose import Choose
from fxgraft.passes.graph.cleanup import Cleanup
from fxgraft.passes.graph.cost import accumulate_pays, inline_merge_pays, joined_down_pays
from fxgraft.passes.graph.fold import Fold
from fxgraft.passes.graph.join_products import JoinProducts
from fxgraft.passes.graph.share import Share


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_stay(name, passes):
    model = adapted(METHODS[name])
    x = torch.randn(5, 12)
    oracle = copy.deepcopy(model).double()(x.double())
    program, _ = run_all(captured(model), (Cleanup(), *passes, Cleanup()))
    assert relative_error(program.graph_module(x), oracle) < 1e-5


@pytest.mark.parametrize("passes", [PASSES["training"], PASSES["siblings, accumulate"]], ids=["rule", "always"])
@pytest.mark.parametrize("name", FIXED)
def test_the_gradients_stay(name, passes):
    model = adapted(METHODS[name], training=True)
    x = torch.randn(5, 12)
    loss = copy.deepcopy(model).double()
    xd = x.double().requires_grad_()
    loss(xd).square().sum().backward()
    want = {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}
    program, _ = run_all(captured(model), (Cleanup(), *passes, Cleanup()))
    x.requires_grad_()
    program.graph_module(x).square().sum().backward()
    got = {n: p.grad for n, p in program.graph_module.named_parameters() if p.grad is not None}
    assert relative_error(x.grad, xd.grad) < 1e-5
    # exporting names tied tensors once, so compare as multisets of sizes and by value
    assert len(got) == len(want) > 0
    for name_, grad in want.items():
        assert any(g.shape == grad.shape and relative_error(g, grad) < 2e-5 for g in got.values()), name_


class Written(nn.Module):
    """Adapted products of one input, with a write where `place` says."""

    def __init__(self, place):
        super().__init__()
        self.q, self.k = nn.Linear(12, 8), nn.Linear(12, 8)
        self.place = place

    def forward(self, x):
        x = x * 1
        q = self.q(x)
        if self.place == "input":
            x.add_(1.0)
        elif self.place == "weight":
            self.k.weight.mul_(1.5)
        elif self.place == "theta":
            self.q.fxgraft_slot0.shared.theta.mul_(1.5)
        elif self.place == "factor":
            self.k.fxgraft_slot0.A.mul_(1.5)
        return q + self.k(x)


@torch.no_grad()
@pytest.mark.parametrize("place", ["input", "weight", "theta", "factor"])
def test_nothing_is_moved_across_a_write(place):
    model = Written(place).eval()
    config = METHODS["unilora" if place == "theta" else "lora"]
    model = perturb(fg.rewrite(model, fg.Spec(config, targets=["q", "k"])), 0.3)
    x = torch.randn(5, 12)
    program = fg.capture(model, (x,))
    for name, passes in PASSES.items():
        own = type(program)(copy.deepcopy(program.graph_module))
        want = copy.deepcopy(program.graph_module)(x)
        made, _ = run_all(own, (Cleanup(), *passes, Cleanup()))
        torch.testing.assert_close(made.graph_module(x), want, msg=lambda m, n=name: f"{n}: {m}")
    if place == "theta":
        assert not Share()(program).modified
    elif place != "input":
        reasons = [n.reason for step in (Fold(), JoinProducts(always=True)) for n in step(program).no_matches]
        assert any("mul_ may write" in reason for reason in reasons), reasons


def test_duplicates_are_dropped():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return self.a(self.a(x))

    model = perturb(fg.rewrite(Twice(), fg.Spec(METHODS["prolora"], targets=["a"])), 0.3)
    program, _ = run_all(fg.capture(model, (torch.randn(5, 12),)), (Cleanup(), Accumulate(always=True), Cleanup()))
    text = printed(program)
    assert text.count("= expanded_down(") == 1 and text.count("= expanded_across(") == 1
    x = torch.randn(5, 12)
    torch.testing.assert_close(program.graph_module(x), model(x), rtol=1e-5, atol=1e-5)


def test_conv1d_is_a_product_too(gpt2, ids):
    spec = fg.Spec(fg.LoRA(2), targets=["c_attn", "c_fc", "mlp.c_proj"])
    model = perturb(fg.rewrite(gpt2, spec))
    inputs = {"input_ids": ids, "use_cache": False}
    want = model(**inputs).logits
    for made, passes in (("onto", (Accumulate(always=True),)), ("merged_linear", (Choose(always=True),))):
        done, _ = run_all(fg.capture(model, inputs), (Cleanup(), *passes))
        assert printed(done).count(f" = {made}(") == 6
        torch.testing.assert_close(done.graph_module(**inputs).logits, want, rtol=1e-5, atol=1e-5)


def test_pipelines_print():
    assert str(pipelines.training) == (
        "pipeline training:\n  1. Cleanup()\n  2. Share()\n  3. Siblings(always=False)\n"
        "  4. Accumulate(always=False)\n  5. Cleanup()"
    )


def test_the_cost_rules_turn_once():
    """More rows never turn a yes into a no, and every rule says yes somewhere and no somewhere."""
    rules = (
        lambda n: joined_down_pays(n, 768, 24, 3, "cpu", False),
        lambda n: accumulate_pays(n, 768, "cpu"),
        lambda n: inline_merge_pays(n, 768, 768, 8, "cpu"),
    )
    for rule in rules:
        answers = [bool(rule(n)) for n in (1, 8, 64, 512, 4096, 32768)]
        assert answers == sorted(answers) and not answers[0] and answers[-1]
    assert not accumulate_pays(4096, 768, "cuda")
    assert inline_merge_pays(None, 768, 768, 8, "cpu").reason.startswith("an unknown number of rows")
