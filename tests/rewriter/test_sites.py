"""Linear-like nodes in all their spellings, and the reason for every non-match."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxgraft.rewriter.capture.trace import trace
from fxgraft.rewriter.errors import CaptureError
from fxgraft.rewriter.parts import Cut
from fxgraft.rewriter.products.find import find_products
from fxgraft.rewriter.products.linear import Linear
from fxgraft.rewriter.sites import NoMatch, Site


class Spelling(nn.Module):
    """Computes a product with `w` by the given function."""

    def __init__(self, how, shape, bias=None):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(bias)) if bias else None
        self.how = how

    def forward(self, x):
        return self.how(self, x)


SPELLINGS = {
    "F.linear": (lambda m, x: F.linear(x, m.w), (5, 7), 1, "linear"),
    "F.linear keywords": (lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), (5, 7), 1, "linear"),
    "matmul operator": (lambda m, x: x @ m.w, (7, 5), 0, "matmul"),
    "torch.matmul": (lambda m, x: torch.matmul(x, m.w), (7, 5), 0, "matmul"),
    "method matmul": (lambda m, x: x.matmul(m.w), (7, 5), 0, "matmul"),
    "torch.mm": (lambda m, x: torch.mm(x, m.w), (7, 5), 0, "matmul"),
    "transposed .t()": (lambda m, x: x @ m.w.t(), (5, 7), 1, "matmul"),
    "transposed .T": (lambda m, x: x @ m.w.T, (5, 7), 1, "matmul"),
    "transposed transpose": (lambda m, x: x @ m.w.transpose(0, 1), (5, 7), 1, "matmul"),
    "cast": (lambda m, x: F.linear(x, m.w.to(x.dtype)), (5, 7), 1, "linear"),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (7, 5), 0, "addmm"),
    "matmul and bias": (lambda m, x: x @ m.w + m.b, (7, 5), 0, "matmul"),
    "aten": (lambda m, x: torch.ops.aten.linear.default(x, m.w, m.b), (5, 7), 1, "linear"),
}


def linears(module):
    return find_products(trace(module).graph, dict(module.named_parameters()))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_a_site_with_roles(spelling):
    how, shape, contracted, form = SPELLINGS[spelling]
    module = Spelling(how, shape, bias=5)
    (found,) = linears(module)["w"]
    assert (found.product.contracted, found.form) == (contracted, form)
    assert module.w.shape[found.product.contracted] == 7 and module.w.shape[1 - found.product.contracted] == 5
    reads_bias = "m.b" in SPELLINGS[spelling][0].__code__.co_names or "b" in SPELLINGS[spelling][0].__code__.co_names
    assert found.bias_name == ("b" if reads_bias else None)


NON_MATCHES = {
    "left operand": (lambda m, x: m.w @ x.t(), "left operand"),
    "sum": (lambda m, x: x + m.w, "not a linear product"),
    "also summed": (lambda m, x: F.linear(x, m.w) + m.w.sum(), "not a linear product"),
    "embedding": (lambda m, x: F.embedding(x.long(), m.w.t()), "looked up transposed"),
    "computed": (lambda m, x: F.linear(x, m.w.exp()), "not a linear product"),
    "scaled addmm": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), "alpha or beta"),
    "unused": (lambda m, x: x, "not read"),
}


@pytest.mark.parametrize("case", NON_MATCHES)
def test_non_matches_say_why(case):
    how, reason = NON_MATCHES[case]
    found = linears(Spelling(how, (7, 7), bias=7))["w"]
    assert isinstance(found, NoMatch) and reason in found.reason


def test_conv1d_is_in_by_out(gpt2):
    conv1d = gpt2.transformer.h[0].attn.c_attn
    (found,) = linears(conv1d)["weight"]
    assert (found.form, found.product.contracted, found.bias_name) == ("addmm", 0, "bias")


def test_one_trace_per_structure():
    first, second, other = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 7)
    assert trace(first) is trace(second)
    assert trace(first) is not trace(other)


def test_mode_stays_a_value():
    class Dropping(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    module = Dropping(4, 4)
    graph = trace(module).graph
    assert any(n.op == "get_attr" and n.target == "training" for n in graph.nodes)
    run = fx.GraphModule(module, graph)
    assert torch.equal(run.eval()(torch.ones(2, 4)), module.eval()(torch.ones(2, 4)))
    assert (run.train()(torch.ones(50, 4)) == 0).any()


def test_untraceable_forwards_say_so():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="cannot trace the forward of Branching"):
        trace(Branching(3, 3))

    class Modal(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2 if self.training else super().forward(x)

    with pytest.raises(CaptureError, match="another path in training"):
        trace(Modal(3, 3))

    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x
    with pytest.raises(CaptureError, match="replaced on the instance"):
        trace(replaced)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_site_that_was_pickled_before_there_were_other_products_opens(parts):
    cut = None if parts == 1 else Cut((4,) * parts)
    site = Site("a", "a", "weight", None, 6, 4, Linear(0), parts - 1, cut, torch.float32, torch.device("cpu"), "addmm")
    state = dict(vars(site), contracted=0, offset=site.offset, parts=parts)
    del state["product"], state["cut"]
    again = Site.__new__(Site)
    again.__setstate__(state)
    assert again == site and pickle.loads(pickle.dumps(again)) == site
