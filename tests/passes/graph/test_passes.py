"""The pass contract, cleanup, and the questions asked of the graph."""

import operator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from small_models import perturb
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fxgraft as fg
from fxgraft.passes.graph.cleanup import Cleanup
from fxgraft.rewriter.analysis.dataflow import can_fuse, dependencies, siblings, tied_names
from fxgraft.rewriter.program import Pass, PassResult, Pipeline, Program, copy_graph


def program(function, **kwargs):
    return Program(fx.symbolic_trace(function), **kwargs)


def targets(p):
    return [n.target for n in p.graph.nodes if n.op == "call_function"]


def in_place_sums(p, *inputs):
    """Tracing turns `y += d` into `y + d`: make it what a grafted graph has, with what a compiler records of it."""
    FakeTensorProp(p.graph_module).propagate(*inputs)
    for node in p.graph.nodes:
        if node.target is operator.add:
            node.target = operator.iadd
    p.graph_module.recompile()
    return p


def test_cleanup_rewrites_each_thing_it_says():
    def f(x, w, d):
        y = F.linear(x, w) + d
        unused = torch.relu(y)  # noqa: F841
        return F.dropout(F.dropout(F.dropout(y, 0.5, training=False), 0.0), 0.5, training=True)

    inputs = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
    result = Cleanup()(in_place_sums(program(f), *inputs))
    assert result.modified and result.count == 4
    assert targets(result.program) == [F.linear, operator.add, F.dropout]
    assert Cleanup()(result.program) == PassResult(result.program, False, 0)
    (add,) = [n for n in result.program.graph.nodes if n.target is operator.add]
    assert add.meta["fxgraft"].made_by == "Cleanup"


def test_cleanup_leaves_statements():
    def f(x, w, d):
        y = F.linear(x, w)
        y.view(-1)[:2].fill_(1.0)
        torch.rand(2)
        torch.neg(d, out=d)
        F.relu(y, inplace=True)
        d.requires_grad_()
        x.relu().sum()  # the only one that does nothing
        return y.sum()

    p = program(f)
    before = len(p.graph.nodes)
    assert Cleanup()(p).count == 2 and len(p.graph.nodes) == before - 2


def test_cleanup_keeps_the_dtype_of_a_sum_in_place():
    def f(x, w, d):
        return F.linear(x, w) + d

    inputs = torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16(), torch.ones(2, 4)
    p = program(f)
    FakeTensorProp(p.graph_module).propagate(*inputs)
    (total,) = [n for n in p.graph.nodes if n.target is operator.add]
    total.target = operator.iadd
    p.graph_module.recompile()
    assert targets(Cleanup()(p).program) == [F.linear, operator.iadd]
    assert p.graph_module(*inputs).dtype == torch.bfloat16


def test_cleanup_leaves_a_product_that_others_read():
    def f(x, w, d):
        y = F.linear(x, w)
        return y + d, y

    inputs = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
    assert targets(Cleanup()(in_place_sums(program(f), *inputs)).program) == [F.linear, operator.iadd]


def test_cleanup_keeps_the_numbers(bert, ids):
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(2))))
    captured = fg.capture(adapted, (ids,))
    expected = captured.graph_module(ids).logits
    torch.testing.assert_close(fg.passes.pipelines.inference(captured).program.graph_module(ids).logits, expected)


@dataclass(frozen=True)
class Broken(Pass):
    how: str = "none"

    def run(self, program):
        return None if self.how == "none" else PassResult(program, True, 0)


def test_the_contract_is_checked():
    with pytest.raises(fg.FxgraftError, match="returned NoneType"):
        Broken()(program(lambda x: x + 1))
    with pytest.raises(fg.FxgraftError, match="modified=True with 0"):
        Broken("lies")(program(lambda x: x + 1))


@dataclass(frozen=True)
class Quiet(Pass):
    """Changes the graph, or hands back another one, and says neither."""

    other: bool = False

    def run(self, program):
        if self.other:
            return PassResult(Program(copy_graph(program.graph_module)), True, 1)
        program.graph.output_node().prepend(program.graph.call_function(torch.relu, (next(iter(program.graph.nodes)),)))
        return PassResult(program, False, 0)


def test_a_pass_that_does_not_say_what_it_did():
    with pytest.raises(fg.FxgraftError, match="modified=False and changed the graph"):
        Quiet()(program(lambda x: x + 1))
    with pytest.raises(fg.FxgraftError, match="in place and returned another graph"):
        Quiet(other=True)(program(lambda x: x + 1))


@dataclass(frozen=True)
class Erase(Pass):
    in_place = False

    def run(self, program):
        (node,) = [n for n in program.graph.nodes if n.target is torch.relu]
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
        return PassResult(program, True, 1)


def test_a_pass_that_is_not_in_place_leaves_its_input():
    before = program(lambda x: torch.relu(x))
    after = Erase()(before).program
    assert targets(before) == [torch.relu] and targets(after) == []


def test_pipelines_print_and_replay():
    line = Pipeline("mine", (Cleanup(), Erase()))
    assert str(line) == "pipeline mine:\n  1. Cleanup()\n  2. Erase()" and list(line) == [Cleanup(), Erase()]
    result = line(program(lambda x: F.dropout(torch.relu(x), 0.1, training=False)))
    assert result.count == 2 and targets(result.program) == []


def test_siblings_and_legality():
    def f(x, a, b, c):
        q, k = F.linear(x, a), F.linear(x, b)
        return F.linear(q, c) + k

    graph = program(f).graph
    q, k, deep = [n for n in graph.nodes if n.target is F.linear]
    reads = lambda n: n.args[0] if n.target is F.linear else None  # noqa: E731
    assert siblings(graph, reads) == [[q, k]]
    flow = dependencies(graph)
    assert can_fuse(flow, [q, k]) is None
    assert "depends on" in can_fuse(flow, [q, deep]).reason


def test_tied_names(llama, bert):
    assert tied_names(llama) == dict.fromkeys(
        ["model.embed_tokens.weight", "lm_head.weight"], frozenset({"model.embed_tokens.weight", "lm_head.weight"})
    )
    assert tied_names(bert) == {}


def test_capture_refuses_a_dynamic_batch_of_one(bert):
    from torch.export import Dim

    with pytest.raises(fg.CaptureError, match="dimension 0 shall be dynamic but its example size is 1"):
        fg.capture(bert, (torch.ones(1, 5, dtype=torch.long),), ({0: Dim("batch")},))
    whole = fg.capture(bert, {"input_ids": torch.ones(2, 5, dtype=torch.long)}, {"input_ids": {0: Dim("batch")}})
    assert whole.graph_module(input_ids=torch.ones(4, 5, dtype=torch.long)).logits.shape == (4, 2)


def test_capture_says_why_it_failed():
    class Data(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(fg.CaptureError, match="Data cannot be captured"):
        fg.capture(Data(), (torch.ones(2),))
