"""Parts by name: what a preset takes for q, k, v, gate and up is what the model's own forward does with these rows."""

import pytest
import torch
import transformers as hf
from methods import METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of

SMALL = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT = {"vocab_size": 31, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
GLU = {"intermediate_size": 24}
END = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {**SMALL, **END, "parallel_attn": True}
PHI = {**SMALL, **GLU, **END, "num_key_value_heads": 2}


def eager(cls, config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = cls(config).eval()
    for parameter in model.parameters():  # as they are drawn, scores are too flat to tell q from k
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


CAUSAL = {
    "gpt_neox": lambda: eager(hf.GPTNeoXModel, hf.GPTNeoXConfig(**SMALL, **GLU)),
    "bloom": lambda: eager(hf.BloomModel, hf.BloomConfig(vocab_size=31, hidden_size=32, n_layer=1, n_head=4)),
    "falcon, new": lambda: eager(
        hf.FalconModel, hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon, one key": lambda: eager(hf.FalconModel, hf.FalconConfig(**FALCON, new_decoder_architecture=False)),
    "falcon, old": lambda: eager(
        hf.FalconModel, hf.FalconConfig(**FALCON, new_decoder_architecture=False, multi_query=False, alibi=True)
    ),
    "mpt": lambda: eager(hf.MptModel, hf.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=31, max_seq_len=16)),
    "codegen": lambda: eager(hf.CodeGenModel, hf.CodeGenConfig(**GPT, rotary_dim=4)),
    "gpt2": lambda: eager(hf.GPT2Model, hf.GPT2Config(**GPT)),
    "bigcode, one key": lambda: eager(hf.GPTBigCodeModel, hf.GPTBigCodeConfig(**GPT)),
    "bigcode, old": lambda: eager(hf.GPTBigCodeModel, hf.GPTBigCodeConfig(**GPT, multi_query=False)),
    "persimmon": lambda: eager(hf.PersimmonModel, hf.PersimmonConfig(**SMALL, **GLU)),
    "phi3": lambda: eager(hf.Phi3Model, hf.Phi3Config(**PHI)),
    "dbrx": lambda: eager(
        hf.DbrxModel,
        hf.DbrxConfig(
            d_model=32, n_heads=4, n_layers=1, vocab_size=31, max_seq_len=16,
            attn_config={"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        ),
    ),
}  # fmt: skip


def deberta():
    torch.manual_seed(0)
    return hf.DebertaModel(hf.DebertaConfig(**SMALL, **GLU, max_position_embeddings=16)).eval()


BOTH_WAYS = {
    "modernbert": lambda: eager(
        hf.ModernBertModel, hf.ModernBertConfig(**SMALL, **GLU, **END, global_attn_every_n_layers=1)
    ),
    "deberta": deberta,
}
GATED = {
    "phi3": ("gate_up_proj", lambda: eager(hf.Phi3Model, hf.Phi3Config(**PHI))),
    "glm": ("gate_up_proj", lambda: eager(hf.GlmModel, hf.GlmConfig(**PHI, head_dim=8))),
}


def rows_of(model, name):
    """The owner of the fused weight and the numbers of the rows that a part of this name is, of the first such site."""
    site = record_of(fg.rewrite(model, fg.Spec(fg.LoRA(2), [name])), "default").sites[0]
    weight = model.get_submodule(site.owner)._parameters[site.weight]
    return site, site.take(torch.arange(site.produced(weight)), -1)


class Stirred:
    """What a model's split makes of a change in some features of the fused product at one position."""

    def __init__(self, model, inputs, site):
        self.model, self.inputs = model, inputs
        self.fused = model.get_submodule(site.owner)
        self.around = model.get_submodule(site.owner.rpartition(".")[0])

    @torch.no_grad()
    def __call__(self, rows=(), scale=1.0, position=0):
        seen = []

        def change(module, args, output):
            noise = torch.randn(len(rows), generator=torch.Generator().manual_seed(3)) * scale
            output = output.clone()
            output[:, position, rows] += noise
            return output

        def look(module, args, output):
            seen.append(output if isinstance(output, torch.Tensor) else output[0])

        hooks = [self.around.register_forward_hook(look)]
        hooks += [self.fused.register_forward_hook(change)] if len(rows) else []
        self.model(**self.inputs)
        for hook in hooks:
            hook.remove()
        return seen[0]


def moved(before, after):
    return ((after - before).abs().amax((0, 2)) > 1e-6).tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_queries_keys_and_values_of_decoders(name):
    """At the first position, which sees itself alone, a query changes nothing, a key what comes later, a value it."""
    model, inputs = CAUSAL[name](), {"input_ids": torch.tensor([[3, 14, 15, 9, 2]])}
    (site, q), (_, k), (_, v) = (rows_of(model, part) for part in ("q_proj", "k_proj", "v_proj"))
    assert sorted(torch.cat([q, k, v]).tolist()) == list(range(len(q) + len(k) + len(v)))
    stirred = Stirred(model, inputs, site)
    base = stirred()
    assert moved(base, stirred(q)) == [False] * 5
    assert moved(base, stirred(k)) == [False, *[True] * 4]
    assert moved(base, stirred(v)) == [True] * 5
    assert moved(base, stirred(q, position=2)) == [False, False, True, False, False]
    one = stirred(v) - base
    torch.testing.assert_close(stirred(v, 2.0) - base, 2 * one, rtol=1e-4, atol=1e-5)
    # a single feature of each too: no row is another part's
    for rows, first in ((q, False), (v, True)):
        for row in rows.tolist():
            assert moved(base, stirred([row]))[0] is first, row


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_queries_keys_and_values_of_encoders(name):
    model, inputs = BOTH_WAYS[name](), {"input_ids": torch.tensor([[3, 14, 15, 9, 2]])}
    parts = {part: rows_of(model, part) for part in ("q_proj", "k_proj", "v_proj")}
    check_encoder(Stirred(model, inputs, parts["q_proj"][0]), {part: rows for part, (_, rows) in parts.items()})


def check_encoder(stirred, parts):
    """A query moves its own position, a key and a value all; what a value moves is proportional to it."""
    base = stirred()
    positions = base.shape[1]
    assert moved(base, stirred(parts["q_proj"], 3.0)) == [True] + [False] * (positions - 1)
    assert sum(moved(base, stirred(parts["k_proj"], 3.0))) > 1
    one, two = stirred(parts["v_proj"]) - base, stirred(parts["v_proj"], 2.0) - base
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-5)
    keys = stirred(parts["k_proj"], 2.0) - base
    assert not torch.allclose(keys, 2 * (stirred(parts["k_proj"]) - base), rtol=1e-2, atol=1e-5)


def test_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=4, num_classes=0, pretrained=False
    ).eval()
    nn.init.normal_(model.blocks[0].attn.qkv.weight, std=0.3)
    parts = {part: rows_of(model, part) for part in ("q_proj", "k_proj", "v_proj")}
    stirred = Stirred(model, {"x": torch.randn(1, 3, 32, 32)}, parts["q_proj"][0])
    check_encoder(stirred, {part: rows for part, (_, rows) in parts.items()})


@pytest.mark.parametrize("name", GATED)
def test_gate_and_up(name):
    """What goes through the activation is not proportional, what is multiplied with it is."""
    weight, make = GATED[name]
    model, inputs = make(), {"input_ids": torch.tensor([[3, 14, 15, 9, 2]])}
    (site, gate), (_, up) = rows_of(model, "gate_proj"), rows_of(model, "up_proj")
    assert site.stem.endswith(weight)
    stirred = Stirred(model, inputs, site)
    base = stirred()
    torch.testing.assert_close(stirred(up, 2.0) - base, 2 * (stirred(up) - base), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stirred(gate, 2.0) - base, 2 * (stirred(gate) - base), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_on_named_parts(method):
    """Phi-3 with fewer keys than queries: parts of unequal sizes."""
    model, inputs = CAUSAL["phi3"](), {"input_ids": torch.tensor([[3, 14, 15, 9, 2]])}
    targets = ["q_proj", "v_proj", "up_proj"]
    if method.adds_bias(record_of(fg.rewrite(model, fg.Spec(fg.LoRA(1), targets)), "default").sites[0]):
        assert model.layers[0].self_attn.qkv_proj.bias is None
    adapted = perturb(graft(model, fg.Spec(method, targets))).eval()
    names = [site.name for site in record_of(adapted, "default").sites]
    assert names == [f"layers.0.{n}" for n in ("self_attn.qkv_proj[0]", "self_attn.qkv_proj[2]", "mlp.gate_up_proj[1]")]
    assert [site.out_features for site in record_of(adapted, "default").sites] == [32, 16, 24]
    x = torch.randn(3, 32)
    delta = adapted.layers[0].self_attn.qkv_proj(x) - model.layers[0].self_attn.qkv_proj(x)
    assert delta[:, 32:48].eq(0).all() and delta[:, :32].any() and delta[:, 48:].any()
    with fg.disabled(adapted):
        assert torch.equal(adapted(**inputs)[0], model(**inputs)[0])


def test_names_in_explain_overrides_and_excludes():
    model = CAUSAL["phi3"]()
    spec = fg.Spec(fg.LoRA(2), ["query", "k_proj", "v_proj"], exclude="k_proj", overrides={"v_proj": fg.LoRA(3)})
    rows = fg.explain(fg.rewrite(model, spec)).rows
    assert [(row.site, row.alias, row.rows, row.tensors["A"]) for row in rows] == [
        ("layers.0.self_attn.qkv_proj[0]", "layers.0.self_attn.q_proj", "rows 0..31 of 64", (2, 32)),
        ("layers.0.self_attn.qkv_proj[2]", "layers.0.self_attn.v_proj", "rows 48..63 of 64", (3, 32)),
    ]
    numbered = fg.Spec(fg.LoRA(2), ["q_proj", "v_proj"], overrides={"qkv_proj[2]": fg.LoRA(3)})
    assert [row.tensors["A"] for row in fg.explain(fg.rewrite(model, numbered)).rows] == [(2, 32), (3, 32)]
    named = fg.Spec(fg.LoRA(2), [fg.Target("qkv_proj", select=("q_proj", "v_proj"))])
    assert [s.name for s in record_of(fg.rewrite(model, named), "default").sites] == [row.site for row in rows]
    counted = fg.Spec(fg.LoRA(2), [fg.Target("qkv_proj", (32, 16, 16), (0, 2))])
    assert [s.alias for s in record_of(fg.rewrite(model, counted), "default").sites] == [row.alias for row in rows]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"targets": ["q_prog"]}, "q_proj"),
        ({"targets": ["qkv_proj", "q_proj"]}, "matched by two targets with different parts"),
        ({"targets": ["qkv_proj"], "exclude": "v_proj"}, "adapted as a whole or in other parts: name the parts"),
        ({"targets": [fg.Target("qkv_proj", select=["gate_proj"])]}, "are 'q_proj', 'k_proj', 'v_proj'"),
    ],
)
def test_names_that_do_not_fit(spec, says):
    with pytest.raises(fg.TargetError) as error:
        fg.rewrite(CAUSAL["phi3"](), fg.Spec(fg.LoRA(2), **spec))
    assert says in str(error.value)


def test_a_preset_that_does_not_fit_is_refused_with_the_numbers():
    model = CAUSAL["phi3"]()
    model.layers[0].self_attn.num_key_value_heads = model.layers[0].self_attn.config.num_key_value_heads = 1
    with pytest.raises(
        fg.TargetError, match=r"produces 64 features, and Phi3Attention would cut 48, 3 parts of 32/8/8"
    ):
        fg.rewrite(model, fg.Spec(fg.LoRA(2), ["q_proj"]))
    attention = CAUSAL["gpt_neox"]().layers[0].attention
    attention.config = None
    with pytest.raises(fg.TargetError, match="have no num_attention_heads"):
        fg.rewrite(attention, fg.Spec(fg.LoRA(2), ["q_proj"]))


def test_a_subclass_with_a_forward_of_its_own_has_no_preset():
    class Own(hf.models.phi3.modeling_phi3.Phi3MLP):
        def forward(self, x):
            up, gate = self.gate_up_proj(x).chunk(2, -1)
            return self.down_proj(up * gate)

    with pytest.raises(fg.TargetError, match="'up_proj' matches nothing"):
        fg.rewrite(Own(hf.Phi3Config(**PHI)), fg.Spec(fg.LoRA(2), ["up_proj"]))


def test_a_layer_of_the_name_comes_before_parts_of_it():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.fused = nn.Module(), CAUSAL["phi3"]()
            self.text.q_proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.text.q_proj(x)

    record = record_of(fg.rewrite(Both(), fg.Spec(fg.LoRA(2), ["q_proj"])), "default")
    assert [site.name for site in record.sites] == ["text.q_proj"]
