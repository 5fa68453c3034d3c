"""HydraLoRA against the paper's formula: a loop over tokens and experts in float64."""

from __future__ import annotations

import math

import pytest
import torch
from one_layer import Net, graft
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxgraft as fg
from fxgraft.passes.methods.hydralora.hydralora import HydraLoRA, expert_dropout
from fxgraft.passes.methods.low_rank_factors import linear_factors

torch.set_num_threads(1)


def oracle(x, masks, state, method):
    """The delta `(tokens, out)`: x `(tokens, in)`, masks `(experts, tokens, in)` already scaled."""
    A, Wg, B = (state[f"layer.{n}"].double() for n in ("A", "router", "B"))
    r = method.rank
    rows = []
    for t, token in enumerate(x.double()):
        logits = [sum(g * v for g, v in zip(gate.tolist(), token.tolist(), strict=True)) for gate in Wg]
        largest = max(logits)
        total = sum(math.exp(l - largest) for l in logits)
        row = 0
        for i, logit in enumerate(logits):
            expert = B[i * r : (i + 1) * r].t()  # (out, r)
            row = row + math.exp(logit - largest) / total * (expert @ (A @ (token * masks[i][t].double())))
        rows.append(method.alpha / r * row)
    return torch.stack(rows)


def relative(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


CASES = [(12, 8, 4, 3, True), (13, 29, 5, 2, False), (29, 7, 1, 4, True), (6, 6, 6, 10, False)]


@pytest.mark.parametrize(("inside", "outside", "rank", "experts", "bias"), CASES)
def test_forward_is_the_formula(inside, outside, rank, experts, bias):
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, bias=bias)
    method = HydraLoRA(rank, experts, alpha=7)
    adapted, state = graft(layer, method)
    x = torch.randn(2, 5, inside)
    flat = x.view(-1, inside)
    expected = oracle(flat, torch.ones(experts, *flat.shape), state, method)
    base = nn.functional.linear(flat.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert relative(adapted(x).view(-1, outside).detach(), (base + expected).detach()) < 1e-5


def test_conv1d_site():
    torch.manual_seed(0)
    layer = Conv1D(23, 10)
    method = HydraLoRA(4, 3)
    adapted, state = graft(layer, method)
    x = torch.randn(6, 10)
    expected = x.double() @ layer.weight.double() + layer.bias.double() + oracle(x, torch.ones(3, 6, 10), state, method)
    assert relative(adapted(x).detach(), expected.detach()) < 1e-5


@pytest.mark.parametrize("per_expert", [None, False, True])
def test_gradients(per_expert):
    """Without dropout (one product for A and router), with one mask, and with a mask per expert."""
    operator = torch.ops.fxgraft.hydralora.default
    x, A, Wg, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 7), (3, 7), (2, 7), (6, 5)))
    mask = (torch.rand(2 if per_expert else 1, 4, 7, dtype=torch.float64) > 0.5) * 2.0

    def run(x, A, Wg, B):
        dropped = x if per_expert is None else x * (mask if per_expert else mask[0])
        return operator(x, dropped, A, Wg, B, 1.5)

    assert torch.autograd.gradcheck(run, (x, A, Wg, B))
    state = {"layer.A": A.detach(), "layer.router": Wg.detach(), "layer.B": B.detach()}
    masks = torch.ones(2, 4, 7) if per_expert is None else mask.expand(2, 4, 7)
    expected = oracle(x.detach(), masks, state, HydraLoRA(3, 2, alpha=4.5))
    torch.testing.assert_close(run(x, A, Wg, B).detach(), expected, rtol=1e-10, atol=1e-10)


def test_the_router_sees_the_undropped_input():
    """With dropout in training, the weights of the experts stay what they are in evaluation."""
    method = HydraLoRA(2, 2, alpha=2, dropout=0.5)
    adapted, state = graft(nn.Linear(6, 4), method)
    state = {k: torch.zeros_like(t) for k, t in state.items()}
    state["layer.A"][:, 0] = 1  # z is the first feature
    state["layer.router"][0, 1:] = 3.0
    state["layer.B"][:2] = 1.0  # the first expert writes, the second is silent
    fg.swap(adapted, state)
    x = torch.ones(200, 6)
    with fg.disabled(adapted):
        base = adapted(x)
    delta = (adapted.train()(x) - base)[:, 0].detach()
    weight = 1 / (1 + math.exp(-15.0))
    kept = delta != 0
    assert 60 < kept.sum() < 140  # the first feature is dropped half of the time
    torch.testing.assert_close(delta[kept], torch.full_like(delta[kept], 2 * 2 * weight))


def test_dropout_once_or_per_expert():
    """Two experts that undo each other: one mask leaves nothing, a mask for each leaves a difference."""
    for per_expert in (False, True):
        method = HydraLoRA(2, 2, dropout=0.5, per_expert_dropout=per_expert)
        adapted, state = graft(nn.Linear(6, 4), method)
        state["layer.router"].zero_()
        state["layer.B"][2:] = -state["layer.B"][:2]
        fg.swap(adapted, state)
        x = torch.randn(32, 6)
        with fg.disabled(adapted):
            base = adapted(x)
        assert (adapted.train()(x) - base).abs().max().item() < 1e-4 or per_expert
        assert (adapted.train()(x) - base).abs().max().item() > 0.1 or not per_expert
        assert (adapted.eval()(x) - base).abs().max().item() < 1e-4
    masks = expert_dropout(torch.ones(50, 6), 0.5, True, 3)
    assert masks.shape == (3, 50, 6)
    assert not torch.equal(masks[0], masks[1])
    assert set(masks.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_starts_as_the_base_bitwise(dropout):
    torch.manual_seed(0)
    base = Net(nn.Linear(70, 45))
    adapted = fg.rewrite(base, fg.Spec(HydraLoRA(dropout=dropout), targets=["layer"]))
    x = torch.randn(3, 5, 70)
    assert torch.equal(adapted(x), base(x))
    state = fg.adapter_state(adapted)
    bound = 1 / math.sqrt(70)
    for name in ("A", "router"):
        assert 0.8 * bound < state[f"layer.{name}"].abs().max() <= bound
    assert not state["layer.B"].any()
    adapted(x).square().sum().backward()
    grads = {n.rsplit(".", 1)[1]: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert grads["B"].any()  # it can leave the start


def test_merging_is_an_error_that_helps():
    adapted, _ = graft(nn.Linear(6, 4), HydraLoRA(2, 2))
    with pytest.raises(fg.MergeError, match=r"router.*unmerged.*swappable"):
        fg.merge(adapted)
    with pytest.raises(fg.MergeError, match="router"):
        linear_factors(adapted, "default")


def test_parameter_counts_on_llama2_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=32, vocab_size=32000)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    attention, mlp = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
    for experts, targets, lora, router in (
        (3, attention, 8_388_608, 786_432),
        (10, attention, 23_068_672, 2_621_440),
        (3, mlp, 24_969_216, 1_843_200),
    ):
        adapted = fg.rewrite(model, fg.Spec(HydraLoRA(8, experts), targets=targets))
        trained = {n: p.numel() for n, p in adapted.named_parameters() if p.requires_grad}
        assert sum(c for n, c in trained.items() if n.endswith(".router")) == router
        assert sum(trained.values()) == lora + router


def test_bfloat16_is_close():
    """Within 2 % of the largest output for bf16 inputs and weights (eps is 0.8 %); the adapter stays float32."""
    layer = nn.Linear(96, 80).to(torch.bfloat16)
    method = HydraLoRA(4, 3, alpha=4)
    adapted, state = graft(layer, method)
    state["layer.router"] *= 0.1  # an undecided router: its rounding is then not all or nothing
    fg.swap(adapted, state)
    assert all(t.dtype == torch.float32 for t in state.values())
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    expected = oracle(x, torch.ones(3, 5, 96), state, method)
    out = adapted(x)
    assert out.dtype == torch.bfloat16
    expected = expected + x.double() @ layer.weight.double().t() + layer.bias.double()
    assert relative(out.detach(), expected.detach()) < 2e-2


def test_softmax_is_float32_for_half_inputs():
    """Routing weights are rounded once, after a float32 softmax."""
    operator = torch.ops.fxgraft.hydralora.default
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    router = torch.tensor([[0.5], [0.25], [-1.0]])
    A, B = torch.ones(1, 1), torch.eye(3)
    weights = operator(x, x, A, router, B, 1.0)
    assert torch.equal(weights, router.t().softmax(-1).to(torch.bfloat16))


@pytest.mark.parametrize("per_expert", [False, True])
def test_compiles_as_one_graph_and_exports_as_one_node(per_expert):
    torch._dynamo.reset()
    adapted, _ = graft(nn.Linear(13, 29), HydraLoRA(4, 3, dropout=0.5, per_expert_dropout=per_expert))
    adapted.train()
    x = torch.randn(2, 3, 13)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    adapted.eval()
    torch.testing.assert_close(compiled(x), adapted(x))
    dynamic = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    program = torch.export.export(adapted, (x,), dynamic_shapes=dynamic, strict=False)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.fxgraft.hydralora.default) == 1
    plain = program.run_decompositions()
    assert not [n for n in plain.graph.nodes if n.op == "call_function" and "fxgraft" in str(n.target)]
    value = torch.randn(5, 20, 13)
    torch.testing.assert_close(plain.module()(value), adapted(value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"experts": 1}, {"experts": 2.0}, {"alpha": -1}, {"dropout": 1.0}, {"per_expert_dropout": 1}],
)
def test_wrong_configs(fields):
    with pytest.raises(fg.SpecError, match=next(iter(fields))):
        HydraLoRA(**fields)


def test_json():
    spec = fg.Spec(HydraLoRA(2, 4, alpha=2.5, dropout=0.1, per_expert_dropout=True), targets=["layer"])
    assert fg.Spec.from_dict(spec.to_dict()) == spec
