"""PRoLoRA against the paper's formulas, written out element by element in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from one_layer import Net, graft
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxgraft as fg
from fxgraft.passes.methods.low_rank_factors import linear_factors
from fxgraft.passes.methods.prolora.prolora import PRoLoRA
from fxgraft.passes.methods.prolora.rotated_chunks import chunks_are_cheaper, rotation
from fxgraft.rewriter.create import graft_adapter

torch.set_num_threads(1)

CASES = [  # in, out, rank, unshared, a_chunks, b_chunks
    (12, 8, 4, 1, 3, 2),
    (13, 29, 8, 1, 7, 7),  # neither divides
    (29, 13, 8, 0, 5, 4),  # all shared; 5 and 4 do not divide
    (10, 6, 6, 2, 2, 3),  # strides above 1
    (9, 7, 3, 2, 4, 3),  # one shared rank: rotation is the identity
    (11, 6, 2, 0, 11, 6),  # chunks of one column
    (5, 11, 4, 1, 4, 9),  # more copies than needed: the last ones are cut off whole
    (7, 9, 4, 4, 3, 3),  # all unshared
    (16, 16, 5, 1, 1, 1),  # one chunk: nothing is shared
]


def oracle_factors(state, inside, outside, method):
    """A (r, in) and B (out, r) in float64, entry by entry."""
    r, u, m, n = method.rank, method.unshared, method.a_chunks, method.b_chunks
    q = r - u
    A = torch.zeros(r, inside, dtype=torch.float64)
    B = torch.zeros(outside, r, dtype=torch.float64)
    wa, wb = math.ceil(inside / m), math.ceil(outside / n)
    sa, sb = max(math.floor(q / m), 1), max(math.floor(q / n), 1)
    for j in range(q):
        for t in range(inside):
            k, i = divmod(t, wa)
            A[j, t] = state["layer.A_shared"][(j + k * sa) % q, i].double()
        for t in range(outside):
            k, i = divmod(t, wb)
            B[t, j] = state["layer.B_shared"][i, (j + k * sb) % q].double()
    for j in range(u):
        A[q + j] = state["layer.A_unshared"][j].double()
        B[:, q + j] = state["layer.B_unshared"][:, j].double()
    return A, B


def relative(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def build(case, alpha=6.0, dropout=0.0):
    inside, outside, r, u, m, n = case
    return inside, outside, PRoLoRA(r, u, m, n, alpha=alpha, dropout=dropout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [(1,), (1, 3), (2, 40)])
def test_forward_is_the_formula(case, tokens):
    inside, outside, method = build(case)
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, bias=inside % 2 == 0)
    adapted, state = graft(layer, method)
    x = torch.randn(*tokens, inside)
    A, B = oracle_factors(state, inside, outside, method)
    delta = 6.0 / method.rank * x.double() @ A.t() @ B.t()
    base = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert relative(adapted(x).detach(), base.detach() + delta) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunked", list(itertools.product([False, True], repeat=2)))
def test_both_computations_agree_and_have_the_right_gradients(case, chunked, monkeypatch):
    """Whatever the cost rule says: expanded and in chunks, for A and for B."""
    inside, outside, method = build(case)
    answers = iter(itertools.cycle(chunked))
    import fxgraft.passes.methods.prolora.prolora as module

    monkeypatch.setattr(module, "chunks_are_cheaper", lambda *_: next(answers))
    adapted, state = graft(nn.Linear(inside, outside).double(), method)
    x = torch.randn(3, inside, dtype=torch.float64)
    A, B = oracle_factors(state, inside, outside, method)
    with fg.disabled(adapted):
        base = adapted(x)
    expected = 6.0 / method.rank * x @ A.t() @ B.t()
    torch.testing.assert_close(adapted(x) - base, expected, rtol=1e-10, atol=1e-10)
    parameters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(parameters) == len(state)

    def run(x, *values):
        return torch.func.functional_call(adapted, dict(zip(parameters, values, strict=True)), (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (x[:2], *parameters.values())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_factors_and_merge(case):
    inside, outside, method = build(case)
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside)
    before = layer.weight.detach().clone()
    adapted, state = graft(layer, method)
    A, B = oracle_factors(state, inside, outside, method)
    [(found_a, found_b)] = linear_factors(adapted, "default").values()
    assert torch.equal(found_a.double(), A)
    assert relative(found_b, B * 6.0 / method.rank) < 1e-6
    merged = fg.merge(adapted)
    assert type(merged.layer) is nn.Linear
    assert relative(merged.layer.weight.detach(), before.double() + 6.0 / method.rank * B @ A) < 1e-6
    assert torch.equal(layer.weight, before)
    x = torch.randn(4, inside)
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-4)


def test_conv1d_site():
    torch.manual_seed(0)
    layer = Conv1D(23, 10)  # out, in; weight (in, out)
    method = PRoLoRA(4, 1, 3, 4)
    adapted, state = graft(layer, method)
    A, B = oracle_factors(state, 10, 23, method)
    x = torch.randn(2, 5, 10)
    expected = x.double() @ (layer.weight.double() + 4.0 * (B @ A).t()) + layer.bias.double()
    assert relative(adapted(x).detach(), expected.detach()) < 1e-5
    assert relative(fg.merge(adapted)(x).detach(), expected.detach()) < 1e-5


def test_all_unshared_is_lora():
    """Same seed, same tensors, same outputs as LoRA of the same rank and alpha."""
    results = {}
    for key, method in (("lora", fg.LoRA(4, alpha=8)), ("pro", PRoLoRA(4, 4, 3, 5, alpha=8))):
        torch.manual_seed(3)
        adapted = fg.rewrite(Net(nn.Linear(10, 14)), fg.Spec(method, targets=["layer"]))
        state = list(fg.adapter_state(adapted).values())
        torch.manual_seed(4)
        with torch.no_grad():
            state[1].normal_()
        results[key] = (state, adapted(torch.linspace(-1, 1, 30).view(3, 10)))
    for lora, pro in zip(results["lora"][0], results["pro"][0], strict=True):
        assert torch.equal(lora, pro)
    torch.testing.assert_close(results["lora"][1], results["pro"][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unshared", [0, 1, 8])
def test_starts_as_the_base_bitwise(unshared):
    torch.manual_seed(0)
    base = Net(nn.Linear(70, 45))
    adapted = fg.rewrite(base, fg.Spec(PRoLoRA(8, unshared), targets=["layer"]))
    x = torch.randn(3, 5, 70)
    assert torch.equal(adapted(x), base(x))
    state = fg.adapter_state(adapted)
    assert all(t.numel() for t in state.values())
    bound = 1 / math.sqrt(70)  # of the full width, for the chunk too
    for key, tensor in state.items():
        if ".A" in key:
            assert 0.8 * bound < tensor.abs().max() <= bound
        else:
            assert not tensor.any()


def llama2_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=32, vocab_size=32000)  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_parameter_counts_on_llama2_7b():
    model = llama2_7b()
    for (r, u, m, n), count in {
        (8, 1, 7, 7): 4_999_520,
        (16, 4, 3, 3): 19_992_064,
        (32, 4, 7, 7): 19_998_080,
        (32, 7, 25, 25): 19_991_520,
    }.items():
        adapted = fg.rewrite(model, fg.Spec(PRoLoRA(r, u, m, n), targets="all-linear"))
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count


def test_bfloat16_is_close():
    """Two skinny products and the base product in bf16: within 2 % of the largest output (eps is 0.8 %)."""
    inside, outside, method = build((96, 80, 8, 1, 7, 7))
    layer = nn.Linear(inside, outside).to(torch.bfloat16)
    adapted, state = graft(layer, method)
    assert all(t.dtype == torch.float32 for t in state.values())
    A, B = oracle_factors(state, inside, outside, method)
    x = torch.randn(4, inside, dtype=torch.bfloat16)
    W = layer.weight.double() + 6.0 / method.rank * B @ A
    out = adapted(x)
    assert out.dtype == torch.bfloat16
    assert relative(out.detach(), (x.double() @ W.t() + layer.bias.double()).detach()) < 2e-2


def test_compiles_as_one_graph_and_exports_as_one_node():
    torch._dynamo.reset()
    adapted, _ = graft(nn.Linear(13, 29), PRoLoRA(8, 1, 7, 7))
    x = torch.randn(2, 3, 13)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), adapted(x))
    dynamic = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    program = torch.export.export(adapted, (x,), dynamic_shapes=dynamic, strict=False)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.fxgraft.prolora.default) == 1
    plain = program.run_decompositions()
    assert not [n for n in plain.graph.nodes if n.op == "call_function" and "fxgraft" in str(n.target)]
    for shape in ((2, 3, 13), (5, 20, 13), (3, 2, 13)):  # one program for few tokens and for many
        value = torch.randn(shape)
        torch.testing.assert_close(plain.module()(value), adapted(value), rtol=1e-5, atol=1e-5)


def test_cost_rule():
    rows = rotation(25, 25)
    assert chunks_are_cheaper(1, 4100, rows)
    assert not chunks_are_cheaper(1024, 4100, rows)
    assert not chunks_are_cheaper(torch.SymInt, 4100, rows)  # not a plain integer
    assert not chunks_are_cheaper(1, 768, rotation(7, 7))  # too little to save
    assert not chunks_are_cheaper(1, 4100, rows.to("meta"))  # launches cost more elsewhere
    answers = [chunks_are_cheaper(t, 4100, rows) for t in range(1, 2048)]
    assert answers == sorted(answers, reverse=True)  # one change only
    # cutting costs more where the chunks do not fit the layer
    assert sum(answers) > sum(chunks_are_cheaper(t, 4099, rows) for t in range(1, 2048)) > 0


def test_dropout_is_on_the_adapter_in_training_only():
    adapted, state = graft(nn.Linear(20, 14), PRoLoRA(4, 1, 3, 4, dropout=0.5))
    x = torch.randn(64, 20)
    with fg.disabled(adapted):
        base = adapted(x)
    full = adapted.eval()(x) - base
    A, B = oracle_factors(state, 20, 14, PRoLoRA(4, 1, 3, 4))
    assert relative(full.detach(), 4.0 * x.double() @ A.t() @ B.t()) < 1e-4
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))
    torch.manual_seed(0)
    mean = torch.stack([adapted(x) - base for _ in range(400)]).mean(0)
    assert relative(mean.detach(), full.detach().double()) < 0.2


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"unshared": 9}, {"unshared": -1}, {"unshared": True}, {"a_chunks": 0}, {"b_chunks": 1.5},
     {"alpha": 0}, {"dropout": 1.0}],
)  # fmt: skip
def test_wrong_configs(fields):
    with pytest.raises(fg.SpecError, match=next(iter(fields))):
        PRoLoRA(**fields)


def test_sites_that_do_not_fit():
    for method, small, less in ((PRoLoRA(4), 6, "a_chunks 6 of 7"), (PRoLoRA(8), 7, "rank 7 of 8")):
        adapted = fg.rewrite(Net(nn.Linear(small, 30)), fg.Spec(method, targets=["layer"]))
        assert fg.explain(adapted).rows[0].less == less
    with pytest.raises(fg.SpecError, match=r"a_chunks=7.*'layer'"):  # to the letter there is no such adapter
        graft_adapter(Net(nn.Linear(6, 30)), fg.Spec(PRoLoRA(4), targets=["layer"]), "default")


def test_json():
    spec = fg.Spec(PRoLoRA(6, 0, 3, 5, alpha=2.5), targets=["layer"])
    assert fg.Spec.from_dict(spec.to_dict()) == spec
