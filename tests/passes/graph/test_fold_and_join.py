"""`Fold` and `JoinProducts`: fixed tensors become factors or weights, products of one input become one."""

from __future__ import annotations

import pytest
import torch
from captured_attention import Attention, adapted, captured, printed
from methods import METHODS
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph.cost import joined_product_pays
from fxgraft.passes.graph.fold import Fold
from fxgraft.passes.graph.join_products import JoinProducts


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


def test_two_fixed_paths_of_one_product_become_one_weight():
    model = Attention()
    for name in "ab":
        model = perturb(fg.rewrite(model, fg.Spec(METHODS["glora"], targets=["q"]), name=name), 0.3)
    fg.set_active(model.eval(), ["a", "b"])
    x = torch.randn(5, 12)
    result = Fold()(captured(model))
    assert result.count == 2
    torch.testing.assert_close(result.program.graph_module(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_second_fold_leaves_the_tensors_of_the_first():
    model = Attention()
    for name, target in (("a", "q"), ("b", "q"), ("c", "k")):
        model = perturb(fg.rewrite(model, fg.Spec(METHODS["glora"], targets=[target]), name=name), 0.3)
    fg.set_active(model.eval(), ["a", "b", "c"])
    x = torch.randn(5, 12)
    first = Fold(swappable=("k.*",))(captured(model))  # of two weights for q the first is read no more
    second = Fold()(first.program)
    assert (first.count, second.count) == (2, 1)
    torch.testing.assert_close(second.program.graph_module(x), model(x), rtol=1e-4, atol=1e-5)


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
