"""Merge: a plain model, float32 arithmetic with one cast, ties respected, nothing silent."""

import copy

import pytest
import torch
from methods import LOW_RANK, MERGEABLE, METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of


@pytest.fixture(params=MERGEABLE)
def method(request):
    return MERGEABLE[request.param]


def test_merged_model_is_plain_and_equal(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query", "dense"], train=["classifier"])))
    merged = fg.merge(adapted)
    assert [type(m) for m in merged.modules()] == [type(m) for m in bert.modules()]
    assert list(merged.state_dict()) == list(bert.state_dict())
    assert not any("fxgraft" in key for m in merged.modules() for key in m.__dict__)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-6)
    ends = ("weight", "bias") if method.adds_bias(record_of(adapted, "default").sites[0]) else ("weight",)
    weights = [f"{layer}.{end}" for layer in ("query", "dense") for end in ends]
    for name, tensor in merged.state_dict().items():
        changed = any(t in name for t in (*weights, "classifier"))
        assert torch.equal(tensor, bert.state_dict()[name]) is not changed, name
        written = method.not_low_rank and name.endswith("bias")  # a method may write the bias it did not change
        if not changed and not written:
            assert tensor.untyped_storage().data_ptr() == bert.state_dict()[name].untyped_storage().data_ptr()
    assert all(p.requires_grad for p in merged.parameters())


def test_base_and_adapted_stay_bit_for_bit(bert, ids, method):
    before = copy.deepcopy(bert.state_dict())
    adapted = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    outputs = adapted(ids).logits
    merged = fg.merge(adapted)
    with torch.no_grad():
        for parameter in merged.classifier.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[n]) for n, t in bert.state_dict().items())
    assert torch.equal(adapted(ids).logits, outputs)
    with fg.disabled(adapted):
        assert torch.equal(adapted(ids).logits, bert(ids).logits)


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
def test_float32_sum_one_cast(method):
    layer = nn.Linear(24, 16).to(torch.bfloat16)
    adapted = perturb(graft(layer, fg.Spec(method)))
    A, B = fg.passes.models.factors.linear_factors(adapted, "default")[""]
    exact = layer.weight.double() + B.double() @ A.double()
    merged = fg.merge(adapted).weight
    assert merged.dtype == torch.bfloat16
    # one rounding to bf16 (8 significant bits): at most half a unit in the last place
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


@pytest.mark.parametrize("method", [m for n, m in METHODS.items() if n not in MERGEABLE], ids=lambda m: m.key)
def test_a_method_that_is_no_weight_is_refused(mlp, method):
    adapted = perturb(graft(mlp, fg.Spec(method, ["up", "down"])))
    before, x = copy.deepcopy(adapted.state_dict()), torch.randn(3, 7)
    want = adapted(x)
    with pytest.raises(fg.MergeError, match=type(method).__name__):
        fg.merge(adapted)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapted.state_dict().items())
    assert torch.equal(adapted(x), want)


def test_several_adapters_and_names(bert, ids):
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(3), ["query"])))
    adapted = perturb(fg.rewrite(adapted, fg.Spec(fg.LoRA(2), ["query", "value"]), name="b"))
    for names in (["default"], ["b"], ["default", "b"]):
        fg.set_active(adapted, names)
        torch.testing.assert_close(fg.merge(adapted)(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fg.merge(adapted, ["b"])(ids).logits, _with(adapted, ["b"], ids), rtol=1e-5, atol=1e-6)
    assert fg.active(adapted) == ["default", "b"]


def _with(adapted, names, ids):
    before = fg.active(adapted)
    fg.set_active(adapted, names)
    out = adapted(ids).logits
    fg.set_active(adapted, before)
    return out


@pytest.mark.parametrize("order", [["lora", "glora"], ["glora", "lora"]])
def test_stacked_deltas_are_all_of_the_base(mlp, order):
    """GLoRA reads the weight: like the forward pass, a merge hands it the base's, whatever was added before."""
    path = fg.GLoRAPath(A="vector", B="lora", C="vector", D="none", E="vector")
    adapted = perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["up", "down"]), name="lora"))
    adapted = perturb(fg.rewrite(adapted, fg.Spec(fg.GLoRA(2, path), ["up", "down"]), name="glora"))
    fg.set_active(adapted, order)
    x = torch.randn(4, 7)
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-4, atol=1e-5)


def test_a_bias_without_a_place_is_refused():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return x @ self.w

    class Unread(Raw):  # an empty `bias` that the product does not take
        def __init__(self):
            super().__init__()
            self.register_parameter("bias", None)

    for bare in (Raw(), Unread()):
        with pytest.raises(fg.SpecError, match="could never be merged"):
            fg.rewrite(bare, fg.Spec(fg.GLoRA(2, fg.GLoRAPath("none", "none", "none", "none", "vector"))))
        with pytest.raises(fg.SpecError, match="could never be merged"):
            fg.rewrite(bare, fg.Spec(fg.GLoRA(2)))
        mergeable = fg.GLoRA(2, fg.GLoRAPath("lora", "vector", "none", "none", "none"))
        adapted = perturb(fg.rewrite(bare, fg.Spec(mergeable)))
        x = torch.randn(3, 6)
        torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_bias_gets_one():
    path = fg.GLoRAPath(A="vector", B="lora", C="vector", D="vector", E="constant")
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    graph, x = torch.fx.symbolic_trace(model), torch.randn(5, 4)
    for base in (model, graph):
        adapted = perturb(fg.rewrite(base, fg.Spec(fg.GLoRA(2, path), ["0", "2"])))
        merged = fg.merge(adapted)
        assert merged.get_submodule("0").bias.shape == (6,) and model[0].bias is None
        torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-5)


def test_conv1d_and_parts(gpt2, ids, method):
    spec = fg.Spec(method, [fg.Target("c_attn", 3, (0, 2)), "c_proj"])
    adapted = perturb(graft(gpt2, spec))
    merged = fg.merge(adapted)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    base = gpt2.transformer.h[0].attn.c_attn.weight
    changed = merged.transformer.h[0].attn.c_attn.weight
    assert torch.equal(changed[:, 32:64], base[:, 32:64])
    assert not torch.equal(changed[:, :32], base[:, :32]) and not torch.equal(changed[:, 64:], base[:, 64:])


def test_a_tied_head_is_untied_and_the_embedding_kept(llama, ids, tmp_path):
    adapted = perturb(fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["lm_head", "q_proj"])))
    merged = fg.merge(adapted)
    assert torch.equal(merged.model.embed_tokens.weight, llama.model.embed_tokens.weight)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    assert llama.config.tie_word_embeddings and not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    restored = type(llama).from_pretrained(tmp_path)
    torch.testing.assert_close(restored(ids).logits, merged(ids).logits)


def test_ties_stay_where_nothing_is_merged(llama):
    merged = fg.merge(perturb(fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["q_proj"]))))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


def test_nan_is_refused(mlp):
    adapted = perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["up", "down"])))
    with torch.no_grad():
        adapted.down.fxgraft.default.A[0, 0] = float("nan")
    with pytest.raises(fg.MergeError, match="'down': adapter 'default' has NaN"):
        fg.merge(adapted)
    with torch.no_grad():
        mlp.up.weight[0, 0] = float("inf")
    with pytest.raises(fg.MergeError, match="'up': the base weight has NaN or infinite"):
        fg.merge(adapted)


def test_overflow_is_refused():
    layer = nn.Linear(4, 4).half()
    adapted = fg.rewrite(layer, fg.Spec(fg.LoRA(2)))
    fg.swap(adapted, {"A": torch.full((2, 4), 300.0), "B": torch.full((4, 2), 300.0)})
    with pytest.raises(fg.MergeError, match=r"overflows torch.float16"):
        fg.merge(adapted)


def test_a_merge_without_effect_warns(mlp):
    with pytest.warns(UserWarning, match="changed no weight"):
        fg.merge(fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["up"])))


def test_nothing_active_and_unknown_names(mlp):
    adapted = fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["up"]))
    with pytest.raises(fg.AdapterError, match="no adapter 'x'"):
        fg.merge(adapted, ["x"])
    with pytest.raises(fg.MergeError, match="at most once"):
        fg.merge(adapted, ["default", "default"])
    fg.set_active(adapted, [])
    with pytest.raises(fg.MergeError, match="no adapter is active"):
        fg.merge(adapted)


def test_meta_weights_are_refused():
    with torch.device("meta"):
        layer = nn.Linear(4, 4)
    with pytest.raises(fg.MergeError, match="meta"):
        fg.merge(fg.rewrite(layer, fg.Spec(fg.LoRA(2))))


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
def test_to_lora_is_exact(gpt2, ids, method):
    spec = fg.Spec(method, [fg.Target("c_attn", 3, (0, 2)), "c_proj"], overrides={"h.1.*": fg.LoRA(2)})
    adapted = perturb(graft(gpt2, spec))
    plain = fg.to_lora(adapted)
    assert {row.method for row in fg.explain(plain).rows} == {"lora"}
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
def test_to_lora_takes_the_head_along(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    plain = fg.to_lora(adapted)
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-6)
    assert "classifier.weight" in fg.adapter_state(plain)
