"""LoRA-XS: operator against a float64 oracle, frozen factors from the SVD, counts, folding, capture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.lora_sb.lora_sb import LoRASB
from fxgraft.passes.methods.lora_xs import LoRAXS, lora_xs, truncated_svd
from fxgraft.rewriter.create import graft_adapter

OP = torch.ops.fxgraft.lora_xs.default


def oracle(x, A, B, R, scale):
    """The definition, one matrix after the other on column vectors, in float64."""
    x, A, B, R = (t.detach().double() for t in (x, A, B, R))
    return torch.stack([scale * (B @ (R @ (A @ v))) for v in x.reshape(-1, x.shape[-1])]).reshape(*x.shape[:-1], -1)


def operands(dtype=torch.float32):
    return torch.randn(2, 5, 7, dtype=dtype), *(torch.randn(*s, dtype=dtype) for s in ((3, 7), (11, 3), (3, 3)))


# -- operator ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_operator_is_the_definition(scale):
    x, A, B, R = operands()
    assert relative_error(lora_xs(x, A, B, R, scale), oracle(x, A, B, R, scale)) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_gradcheck(scale):
    x, A, B, R = operands(torch.float64)
    x.requires_grad_()
    R.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, R: lora_xs(x, A, B, R, scale), (x, R))


def test_bf16_input_gives_bf16():
    x, A, B, R = operands()
    y = lora_xs(x.bfloat16(), A, B, R, 1.0)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, oracle(x, A, B, R, 1.0)) < 3e-2  # three roundings to 8 bits


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


def test_backward_keeps_nothing_as_wide_as_the_input():
    x, A, B, R = operands()
    x.requires_grad_()
    R.requires_grad_()
    saved = saved_by(lambda: lora_xs(x, A, B, R, 0.5))
    tokens, (r, inside), outside = x[..., 0].numel(), A.shape, B.shape[0]
    activations = [t for t in saved if t.numel() % tokens == 0 and t.numel() not in (A.numel(), B.numel(), R.numel())]
    assert [t.numel() for t in activations] == [tokens * r]
    assert not any(t.numel() in (tokens * inside, tokens * outside) for t in saved)
    A.requires_grad_()  # the check sees it where it is kept
    assert any(t.numel() == tokens * inside for t in saved_by(lambda: lora_xs(x, A, B, R, 0.5)))


# -- SVD ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(13, 13), (29, 8), (8, 29)])
def test_exact_svd(shape):
    matrix = torch.randn(shape)
    U, S, Vh = truncated_svd(matrix, 3)
    best = torch.linalg.svd(matrix.double())
    oracle = best.U[:, :3] @ torch.diag(best.S[:3]) @ best.Vh[:3]
    assert relative_error(U @ torch.diag(S) @ Vh, oracle) < 1e-5
    assert relative_error(S, best.S[:3]) < 1e-5


@pytest.mark.parametrize("shape", [(150, 90), (90, 150)])
@pytest.mark.parametrize("decay,close", [(True, 1e-5), (False, 2e-2)])
def test_randomised_svd_captures_what_it_says(shape, decay, close):
    matrix = torch.randn(shape)
    if decay:
        full = torch.linalg.svd(matrix, full_matrices=False)
        matrix = full.U @ torch.diag(0.8 ** torch.arange(90.0)) @ full.Vh
    U, S, Vh = truncated_svd(matrix, 6, exact_up_to=0, oversample=16)
    best = torch.linalg.svdvals(matrix.double())[:6].square().sum()
    for captured in (S.square().sum(), (U.t() @ matrix @ Vh.t()).square().sum()):
        assert 1 - close < captured / best < 1 + 1e-5
    assert relative_error(U.t() @ U, torch.eye(6)) < 1e-5
    assert relative_error(Vh @ Vh.t(), torch.eye(6)) < 1e-5


def test_randomised_svd_is_repeatable_and_leaves_the_random_state():
    matrix, state = torch.randn(60, 80), torch.get_rng_state()
    first = truncated_svd(matrix, 4, exact_up_to=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(matrix, 4, exact_up_to=0), strict=True))


# -- config ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"rank": 2.0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_wrong_values_raise_at_construction(values):
    with pytest.raises(fg.SpecError, match=next(iter(values))):
        LoRAXS(**values)


def test_json_round_trip():
    spec = fg.Spec(LoRAXS(rank=3, alpha=5, dropout=0.1), targets=["up"])
    assert fg.Spec.from_dict(spec.to_dict()) == spec


def test_a_rank_above_the_site_is_what_the_site_can_have(mlp):
    spec = fg.Spec(LoRAXS(rank=6), targets=["down"])
    assert fg.explain(fg.rewrite(mlp, spec)).rows[0].less == "rank 5 of 6"
    with pytest.raises(fg.SpecError, match="at most 5"):  # to the letter there is no such adapter
        graft_adapter(mlp, spec, "default")


def test_quantised_and_broken_weights_are_errors(mlp):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    with pytest.raises(fg.SpecError, match="dequantise"):
        fg.rewrite(nn.Sequential(Packed()), fg.Spec(LoRAXS(rank=2), targets=["0"]))
    with torch.no_grad():
        mlp.up.weight[0, 0] = float("nan")
    with pytest.raises(fg.SpecError, match="'up' has NaN"):
        fg.rewrite(mlp, fg.Spec(LoRAXS(rank=2), targets=["up"]))


# -- what the graft starts from ----------------------------------------------------------------------------------
def weight_of(model, site):
    """The base weight `(out, in)` in float64, whatever layer stores it."""
    layer = model.get_submodule(site)
    weight = layer.weight.detach().double()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def delta_of(state, site, scale):
    A, B, R = (state[f"{site}.{n}"].double() for n in "ABR")
    return scale * B @ R @ A


def test_factors_are_the_truncated_svd(mlp):
    state = fg.adapter_state(fg.rewrite(mlp, fg.Spec(LoRAXS(rank=3), targets=["up", "down"])))
    assert set(state) == {f"{s}.{n}" for s in ("up", "down") for n in "ABR"}, "frozen factors are saved too"
    for site in ("up", "down"):
        A, B = state[f"{site}.A"].double(), state[f"{site}.B"].double()
        svd = torch.linalg.svd(weight_of(mlp, site))
        assert relative_error(B @ A, svd.U[:, :3] @ torch.diag(svd.S[:3]) @ svd.Vh[:3]) < 1e-5
        assert relative_error(B.t() @ B, torch.eye(3)) < 1e-5, "B is orthonormal"
        assert relative_error(A @ A.t(), torch.diag(svd.S[:3] ** 2)) < 1e-5, "the singular values are in A"


def test_initial_R_has_the_stated_spread():
    layer = nn.Sequential(nn.Linear(64, 64))
    R = fg.adapter_state(fg.rewrite(layer, fg.Spec(LoRAXS(rank=64), targets=["0"])))["0.R"]
    assert 0.9e-5 < R.std() < 1.1e-5
    assert abs(R.mean()) < 1e-6


def test_initial_delta_is_BRA(mlp):
    """1e-5 times the weight is below float32's resolution of the output, so the output is compared in float64."""
    mlp = mlp.double()
    adapted = fg.rewrite(mlp, fg.Spec(LoRAXS(rank=3, alpha=5), targets=["up"]))
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = delta_of(fg.adapter_state(adapted), "up", 5 / 3)
    moved = adapted.up(x) - mlp.up(x)
    assert moved.abs().max() > 1e-7
    assert relative_error(moved, x @ delta.t()) < 1e-5


@pytest.mark.parametrize("fixture,targets", [("bert", ["query", "value"]), ("gpt2", ["c_attn", "c_fc"])])
def test_merge_is_the_forward_and_the_oracle(fixture, targets, ids, request):
    base = request.getfixturevalue(fixture)
    adapted = perturb(fg.rewrite(base, fg.Spec(LoRAXS(rank=4, alpha=6), targets=targets)), 0.3)
    merged = fg.merge(adapted)
    for name, record in fg.adapter_state(adapted).items():
        site, _, kind = name.rpartition(".")
        if kind == "R":
            assert record.abs().max() > 0.01
            expected = weight_of(base, site) + delta_of(fg.adapter_state(adapted), site, 1.5)
            assert relative_error(weight_of(merged, site), expected) < 1e-5
    with torch.no_grad():
        want, got = merged(ids).logits, adapted(ids).logits
        assert relative_error(got, want) < 1e-5
        assert relative_error(base(ids).logits, want) > 1e-3


def test_part_of_a_fused_weight(gpt2, ids):
    spec = fg.Spec(LoRAXS(rank=4), targets=[fg.Target("c_attn", parts=3, select=(0, 2))])
    adapted = fg.rewrite(gpt2, spec)
    state = fg.adapter_state(adapted)
    q = weight_of(gpt2, "transformer.h.0.attn.c_attn")[:32]
    svd = torch.linalg.svd(q)
    A, B = (state[f"transformer.h.0.attn.c_attn[0].{n}"].double() for n in "AB")
    assert relative_error(B @ A, svd.U[:, :4] @ torch.diag(svd.S[:4]) @ svd.Vh[:4]) < 1e-5
    perturb(adapted, 0.3)
    with torch.no_grad():
        assert relative_error(adapted(ids).logits, fg.merge(adapted)(ids).logits) < 1e-5


def test_only_R_trains(bert, ids):
    adapted = fg.rewrite(bert, fg.Spec(LoRAXS(rank=4), targets=["query", "value"]))
    adapted(ids).logits.sum().backward()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == {"R"}
    assert len(trained) == 4
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == trained
    assert not any(b.requires_grad or b.grad is not None for b in adapted.buffers())


def test_bf16_base(bert, ids):
    base = bert.bfloat16()
    adapted = perturb(fg.rewrite(base, fg.Spec(LoRAXS(rank=4), targets=["query"])), 0.3)
    state = fg.adapter_state(adapted)
    assert {t.dtype for t in state.values()} == {torch.float32}
    site = "bert.encoder.layer.0.attention.self.query"
    svd = torch.linalg.svd(weight_of(base, site))
    BA = state[f"{site}.B"].double() @ state[f"{site}.A"].double()
    assert relative_error(BA, svd.U[:, :4] @ torch.diag(svd.S[:4]) @ svd.Vh[:4]) < 1e-5
    layer, x = adapted.get_submodule(site), torch.randn(5, 32).bfloat16()
    expected = x.double() @ (weight_of(base, site) + delta_of(state, site, 8.0)).t() + layer.bias.double()
    assert relative_error(layer(x), expected) < 3e-2


def test_dropout_is_on_the_branch_in_training_only(mlp):
    mlp = mlp.double()
    adapted = perturb(fg.rewrite(mlp, fg.Spec(LoRAXS(rank=3, dropout=0.5), targets=["up"])))
    x = torch.randn(6, 7, dtype=torch.float64)
    assert torch.equal(adapted(x), adapted(x))
    adapted.train()
    branches = [(adapted.up(x) - mlp.up(x)).detach() for _ in range(2)]
    assert not torch.allclose(*branches)
    torch.manual_seed(5)
    got = (adapted.up(x) - mlp.up(x)).detach()
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5, True)
    assert relative_error(got, dropped @ delta_of(fg.adapter_state(adapted), "up", 32 / 3).t()) < 1e-5


# -- capture -----------------------------------------------------------------------------------------------------
def test_export_keeps_one_node(mlp):
    adapted = fg.rewrite(mlp, fg.Spec(LoRAXS(rank=3, alpha=5), targets=["up"]))
    program = torch.export.export(adapted, (torch.randn(2, 7),), strict=False)
    assert [n.target for n in program.graph.nodes].count(OP) == 1
    plain = program.run_decompositions()
    assert not any(n.target is OP for n in plain.graph.nodes)
    x = torch.randn(2, 7)
    assert relative_error(plain.module()(x), adapted(x)) < 1e-5


def test_compile_sees_one_node_without_a_break(mlp):
    adapted = perturb(fg.rewrite(mlp, fg.Spec(LoRAXS(rank=3), targets=["up", "down"])))
    graphs = []
    fast = torch.compile(adapted, backend=lambda gm, inputs: graphs.append(gm) or gm.forward, fullgraph=True)
    x = torch.randn(2, 7)
    assert relative_error(fast(x), adapted(x)) < 1e-5
    assert len(graphs) == 1
    assert [n.target for n in graphs[0].graph.nodes].count(OP) == 2


# -- counts of the papers, on models without memory ----------------------------------------------------------------
def mistral_7b():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000,
        )
    )  # fmt: skip


def gemma_2_9b():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256, vocab_size=256000,
        )
    )  # fmt: skip


def llama_3_2_3b():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            num_key_value_heads=8, head_dim=128, vocab_size=128256,
        )
    )  # fmt: skip


def roberta_large():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50265
        )
    )


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROBERTA = ["query", "value", "attention.output.dense", "re:.*layer\\.\\d+\\.output\\.dense"]


@pytest.mark.parametrize(
    "build,targets,sites,counts",
    [
        (mistral_7b, LINEARS, 224, {32: 229_376, 64: 917_504, 96: 2_064_384}),
        (gemma_2_9b, LINEARS, 294, {32: 301_056, 64: 1_204_224, 96: 2_709_504}),
        (llama_3_2_3b, LINEARS, 196, {32: 200_704, 64: 802_816, 96: 1_806_336}),
        (roberta_large, ROBERTA, 96, {8: 6_144, 16: 24_576, 24: 55_296}),
    ],
)
def test_trainable_counts_of_the_papers(build, targets, sites, counts):
    with torch.device("meta"):
        model = build()
    for rank, count in counts.items():
        for method in (LoRAXS(rank=rank), LoRASB(rank=rank)):
            adapted = fg.rewrite(model, fg.Spec(method, targets=targets))
            trained = [p for p in adapted.parameters() if p.requires_grad]
            assert (len(trained), sum(p.numel() for p in trained)) == (sites, count), method
            assert all(t.device.type == "meta" for t in fg.adapter_state(adapted).values())


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAXS().rank = 3
