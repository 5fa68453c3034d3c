"""The passes that make adapters cheap: the printed graphs, the numbers, and a reason wherever they do nothing."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph import pipelines
from fxgraft.passes.graph.accumulate import Accumulate
from fxgraft.passes.graph.choose import Choose
from fxgraft.passes.graph.cleanup import Cleanup
from fxgraft.passes.graph.cost import accumulate_pays, inline_merge_pays, joined_down_pays, joined_product_pays
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


METHODS = {
    "lora": fg.LoRA(rank=2),
    "lora_xs": fg.LoRAXS(rank=3),
    "unilora": fg.UniLoRA(rank=2, vector_length=50),
    "prolora": fg.PRoLoRA(rank=4, unshared=1, a_chunks=5, b_chunks=4),
    "hydralora": fg.HydraLoRA(rank=2, experts=3),
    "glora": fg.GLoRA(rank=2, path=fg.GLoRAPath(A="lora", B="lora", C="lora", D="vector", E="vector")),
    "glora rows": fg.GLoRA(rank=2, path=fg.GLoRAPath(A="vector", B="vector", C="none", D="constant", E="none")),
}
LOW_RANK = ("lora", "lora_xs", "unilora", "prolora")
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
    return perturb(fg.rewrite(model, fg.Spec(method, targets=["q", "k", "v", "out"])), 0.3).train(training)


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


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_stay(name, passes):
    model = adapted(METHODS[name])
    x = torch.randn(5, 12)
    oracle = copy.deepcopy(model).double()(x.double())
    program, _ = run_all(captured(model), (Cleanup(), *passes, Cleanup()))
    assert relative_error(program.graph_module(x), oracle) < 1e-5


@pytest.mark.parametrize("passes", [PASSES["training"], PASSES["siblings, accumulate"]], ids=["rule", "always"])
@pytest.mark.parametrize("name", METHODS)
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


def test_products_stay_apart_where_their_layout_is_looked_at():
    class Flat(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.q, self.k, self.flat = nn.Linear(12, 8), nn.Linear(12, 8), flat

        def forward(self, x):
            q = self.q(x)
            q = q.view(-1).view(5, 8) if self.flat else q.view(5, 2, 4).transpose(1, 2).reshape(5, 8)
            return q + self.k(x)

    x = torch.randn(5, 12)
    for flat in (False, True):
        model = Flat(flat).eval()
        result = JoinProducts(always=True)(fg.capture(model, (x,)))
        torch.testing.assert_close(result.program.graph_module(x), model(x))
        assert result.modified is not flat
        assert not flat or "in a block of its own" in result.no_matches[0].reason


def test_products_of_a_joined_product_are_joined():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x):
            a = self.a(x)
            return self.b(x), self.c(a), self.d(a)

    model, x = Twice().eval(), torch.randn(5, 12)
    result = JoinProducts(always=True)(fg.capture(model, (x,)))
    assert result.count == 4
    for one, other in zip(result.program.graph_module(x), model(x), strict=True):
        torch.testing.assert_close(one, other)


def test_fold_makes_two_factors():
    for name in ("lora", "lora_xs", "unilora", "prolora"):
        program = captured(adapted(METHODS[name]))
        before = str(program.graph)
        result = Fold()(program)
        assert result.count == 4 and str(program.graph) == before
        lora = [n for n in result.program.graph.nodes if str(n.target) == "fxgraft.lora.default"]
        assert len(lora) == 4 and all(n.args[3] == 1.0 for n in lora)
        left = [
            n
            for n, _ in [*result.program.graph_module.named_parameters(), *result.program.graph_module.named_buffers()]
        ]
        assert not any("fxgraft" in n for n in left) and sum(n.startswith("folded_") for n in left) == 8
        assert [n.reason for n in Fold()(result.program).no_matches] == ["two plain factors already"] * 4


def test_fold_leaves_swappable_tensors():
    program = captured(adapted(METHODS["lora_xs"]))
    result = Fold(swappable=("*.R",))(program)
    assert not result.modified and all("is swappable" in n.reason for n in result.no_matches)
    reasons = {n.reason for n in Fold()(captured(adapted(METHODS["hydralora"]))).no_matches}
    assert reasons == {"its up half is more than a product"}


@pytest.mark.parametrize("name", ["glora", "glora rows"])
def test_fold_turns_a_fixed_path_into_weights(name):
    model = adapted(METHODS[name])
    result = Fold()(captured(model))
    targets = [str(n.target) for n in result.program.graph.nodes if n.op == "call_function"]
    assert result.count == 4 and not any("fxgraft" in t for t in targets)
    x = torch.randn(5, 12)
    assert relative_error(result.program.graph_module(x), fg.merge(model).double()(x.double())) < 1e-5
    sizes = {tuple(t.shape) for t in result.program.graph_module.buffers()}
    assert (8, 12) in sizes and not any("weight" in n for n, _ in result.program.graph_module.named_parameters())


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


# -- joined base products ------------------------------------------------------------------------------------------
GOLDEN_JOINED = """\
linear_default = linear.default(x, joined_weight_0, joined_bias_0)
split_with_sizes_default = split_with_sizes.default(linear_default, [8, 8, 6], -1)
getitem = getitem(split_with_sizes_default, 0)
getitem_1 = getitem(split_with_sizes_default, 1)"""


def test_joined_products_print_and_own_one_weight():
    program = captured(Attention().eval())
    before = str(program)
    result = JoinProducts(always=True)(program)
    assert result.count == 3
    assert "\n".join(printed(result.program).splitlines()[:4]) == GOLDEN_JOINED
    module = result.program.graph_module
    assert [name for name, _ in module.named_parameters()] == ["out.weight"]  # the joined ones took their place
    assert {name: tuple(b.shape) for name, b in module.named_buffers()} == {
        "joined_weight_0": (22, 12),
        "joined_bias_0": (22,),
    }
    assert str(program) == before and len(list(program.graph_module.parameters())) == 7


class Mixed(nn.Module):
    """Two products of x in the Conv1D layout, one of them without bias, and one of the result of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(6, n)) for n in (4, 5, 6))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        first = torch.addmm(self.bias, x, self.a)
        second = torch.addmm(x.new_zeros(5), x, self.b)
        return torch.cat([first, second], -1) @ torch.ones(9, 6) + torch.addmm(
            x.new_zeros(6), first @ self.c[:4], self.c
        )


def test_products_of_other_layouts_and_of_each_other():
    model = Mixed().eval()
    x = torch.randn(3, 6)
    result = JoinProducts(always=True)(fg.capture(model, (x,)))
    assert relative_error(result.program.graph_module(x), model(x).double()) < 1e-5


def test_joining_says_why_not():
    def reasons(step, model):
        return {no_match.reason for no_match in step(captured(model)).no_matches}

    plain = Attention().eval()
    assert any("on cpu one wide product takes as long as 3 narrow ones" in r for r in reasons(JoinProducts(), plain))
    assert "k.weight is swappable" in reasons(JoinProducts(swappable=("k.weight",), always=True), plain)
    alone = reasons(JoinProducts(swappable=("k.*", "v.*"), always=True), plain)
    assert {"k.weight is swappable", "v.weight is swappable"} <= alone
    training = Attention().train()
    assert reasons(JoinProducts(always=True), training) == {"training: the weights may still change"}
    assert joined_product_pays(16, 3, "cuda") and not joined_product_pays(16, 3, "cpu")
