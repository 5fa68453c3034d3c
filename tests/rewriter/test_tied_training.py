"""Training in full what is tied, indexed, listed or read by a parent: the model computes with the trained values
everywhere, and what is merged or saved is the same function."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import perturb
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxgraft as fg

LORA = fg.LoRA(rank=2, alpha=2)


class Tied(nn.Module):
    """An embedding and a head over one parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.q(self.embed(ids))))


def ids_of(vocabulary=11):
    return torch.randint(0, vocabulary, (2, 5))


def rewritten(model, train, **options):
    return perturb(fg.rewrite(model, fg.Spec(LORA, targets=["q"], train=train, **options)))


def oracle(adapted, model, values):
    """The base model with the trained values of its parameters, and the adapter of q merged."""
    plain = fg.merge(fg.rewrite(model, fg.Spec(LORA, targets=["q"])), ["default"])
    plain = copy.deepcopy(plain)
    q = fg.adapter_state(adapted)
    plain.q.weight.data += q["q.B"] @ q["q.A"]
    for path, value in values.items():
        plain.get_parameter(path).data = value.clone()
    return plain


@pytest.mark.filterwarnings("ignore:merging")
@pytest.mark.parametrize("trained", ["embed", "head"])
def test_both_of_two_tied_modules_compute_with_the_trained_copy(trained, tmp_path):
    model, ids = Tied(), ids_of()
    before = copy.deepcopy(model.state_dict())
    adapted = rewritten(model, [trained])
    value = fg.adapter_state(adapted)[f"{trained}.weight"]
    values = {"embed.weight": value}
    if trained == "head":
        values["head.bias"] = fg.adapter_state(adapted)["head.bias"]
    plain = oracle(adapted, model, values)
    assert plain.embed.weight is plain.head.weight
    want = plain(ids)
    torch.testing.assert_close(adapted(ids), want)
    merged = fg.merge(adapted)
    assert merged.embed.weight is merged.head.weight
    torch.testing.assert_close(merged(ids), want)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(twin(ids), want)
        names = {n for n, p in twin.named_parameters() if p.requires_grad}
        assert names == {n for n, p in adapted.named_parameters() if p.requires_grad}
    loaded = fg.load_adapter(model, fg.save_adapter(adapted, tmp_path / "native"))
    torch.testing.assert_close(loaded(ids), want)
    from_peft = fg.load_adapter(model, fg.save_adapter(adapted, tmp_path / "peft", format="peft"))
    torch.testing.assert_close(from_peft(ids), want)
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(ids), want)
    torch.testing.assert_close(fg.to_lora(adapted)(ids), want)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(ids), model(ids))
    fg.remove(adapted, "default")
    torch.testing.assert_close(adapted(ids), model(ids))
    assert type(adapted.embed) is nn.Embedding and adapted.embed.weight is adapted.head.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_of_both_uses_reach_the_one_trained_tensor():
    model, ids = Tied(), ids_of()
    reference = copy.deepcopy(model)
    reference(ids).sum().backward()
    adapted = fg.rewrite(model, fg.Spec(LORA, targets=["q"], train=["embed"]))
    adapted(ids).sum().backward()
    (grad,) = [p.grad for n, p in adapted.named_parameters() if n.startswith("embed.fxgraft")]
    torch.testing.assert_close(grad, reference.embed.weight.grad)


@pytest.mark.filterwarnings("ignore:merging")
def test_untied_on_request_says_so():
    model, ids = Tied(), ids_of()
    with pytest.warns(UserWarning, match=r"unties 'head' from 'embed.weight'"):
        adapted = rewritten(model, ["head"], keep_ties=False)
    state = fg.adapter_state(adapted)
    plain = oracle(adapted, model, {"head.bias": state["head.bias"]})
    plain.head.weight = nn.Parameter(state["head.weight"].clone())
    torch.testing.assert_close(adapted(ids), plain(ids))
    torch.testing.assert_close(fg.merge(adapted)(ids), plain(ids))
    assert "which keep the base's values" in {row.site: row.tied for row in fg.explain(adapted).rows}["head"]
    assert fg.Spec.from_dict(fg.Spec(LORA, "q", train=["head"], keep_ties=False).to_dict()) == (
        fg.Spec(LORA, "q", train=["head"], keep_ties=False)
    )


def test_a_spec_written_before_there_were_ties_is_untied():
    old = fg.Spec(LORA, "q", train=["head"]).to_dict()
    del old["keep_ties"]
    assert not fg.Spec.from_dict(old).keep_ties and fg.Spec.from_dict(fg.Spec(LORA, "q").to_dict()).keep_ties


def test_explain_tells_the_tie():
    said = {row.site: row.tied for row in fg.explain(rewritten(Tied(), ["head"])).rows}
    assert said["head"] == "tied to 'embed.weight', which follow" and not said["q"]
    on_head = fg.rewrite(Tied(), fg.Spec(LORA, "head"))
    assert fg.explain(on_head).rows[0].tied == "tied to 'embed.weight', which keep the base's values"


def test_an_adapter_on_what_follows_is_refused():
    with pytest.raises(fg.TargetError, match=r"'head' is tied to 'embed'.*keep_ties=False"):
        fg.rewrite(Tied(), fg.Spec(LORA, ["q", "head"], train=["embed"]))
    adapted = fg.rewrite(Tied(), fg.Spec(LORA, "q", train=["embed"]))
    both = fg.rewrite(adapted, fg.Spec(LORA, "head"), name="second")
    with pytest.raises(fg.AdapterError, match="only one of them can be active"):
        fg.set_active(both, ["default", "second"])
    assert fg.active(both) == ["second"]


def test_switching_between_adapters_that_train_either_of_two_tied_modules():
    model, ids = Tied(), ids_of()
    first = rewritten(model, ["embed"])
    want = first(ids).detach()
    both = perturb(fg.rewrite(first, fg.Spec(LORA, targets=["q"], train=["head"]), name="b"))
    with pytest.raises(fg.AdapterError, match="trained"):
        fg.set_active(both, ["default", "b"])
    fg.set_active(both, ["default"])
    torch.testing.assert_close(both(ids), want)
    fg.set_active(both, ["b"])
    torch.testing.assert_close(fg.merge(both)(ids), both(ids))
    assert not torch.allclose(both(ids), want, atol=1e-3)
    fg.remove(both, "b")
    torch.testing.assert_close(both(ids), model(ids))


def test_two_trained_modules_that_are_tied_stay_tied():
    adapted = rewritten(Tied(), ["embed", "head"])
    assert len([n for n, p in adapted.named_parameters() if p.requires_grad and n.endswith("weight")]) == 1
    torch.testing.assert_close(fg.merge(adapted)(ids := ids_of()), adapted(ids))


def test_onnx_of_a_tied_model(tmp_path):
    adapted = rewritten(Tied().eval(), ["head"])
    fg.export_onnx(adapted, tmp_path / "model.onnx", (ids_of(),), adapters="swappable")  # compares with torch itself


def test_a_bank_refuses_what_it_cannot_stack():
    adapted = rewritten(Tied(), ["head"])
    with pytest.raises(fg.AdapterError, match="keep_ties=False"):
        fg.bank(adapted, {"a": adapted})


def t5():
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval(), "q"


def bart():
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval(), "q_proj"


def llama():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), "q_proj"


@pytest.mark.parametrize(
    ("make", "train"),
    [(t5, "shared"), (t5, "lm_head"), (bart, "shared"), (bart, "lm_head"), (llama, "lm_head"), (llama, "embed_tokens")],
)
def test_models_with_a_shared_embedding(make, train, tmp_path):
    model, target = make()
    ids = ids_of(32)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, targets=[target], train=[train])))
    loss = adapted(**inputs, labels=ids).loss if not model.config.is_encoder_decoder else None
    (adapted(input_ids=ids, labels=ids).loss if loss is None else loss).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    want = adapted(**inputs).logits.detach()
    merged = fg.merge(adapted)
    torch.testing.assert_close(merged(**inputs).logits, want, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**inputs).logits, want, atol=1e-4, rtol=1e-4)
    loaded = fg.load_adapter(model, fg.save_adapter(adapted, tmp_path / "adapter"))
    torch.testing.assert_close(loaded(**inputs).logits, want)
    value = adapted.state_dict()[next(n for n in adapted.state_dict() if n.endswith(f"{train}.fxgraft.default.weight"))]
    embeddings = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert all(torch.equal(weight, value) for weight in embeddings)


# -- modules that a parent does not call -------------------------------------------------------------------------
class Reads(nn.Module):
    """Modules used in every way but calling them."""

    def __init__(self, how):
        super().__init__()
        self.how, self.q = how, nn.Linear(6, 6)
        layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]
        self.part = {
            "weight": lambda: nn.Linear(6, 6),
            "inner weight": lambda: nn.Sequential(*layers),
            "list": lambda: nn.ModuleList(layers),
            "dict": lambda: nn.ModuleDict({"a": layers[0], "b": layers[2]}),
            "items": lambda: nn.ModuleDict({"a": layers[0], "b": layers[2]}),
            "parameters": lambda: nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(2)]),
            "parameter dict": lambda: nn.ParameterDict({"a": nn.Parameter(torch.randn(6))}),
            "index": lambda: nn.Sequential(*layers),
            "slice": lambda: nn.Sequential(*layers),
            "loop": lambda: nn.Sequential(*layers),
            "method": lambda: Scorer(),
            "bound": lambda: nn.Linear(6, 6),
        }[how]()
        if how == "bound":
            self.call = self.part.forward

    def forward(self, x):
        x, p = torch.tanh(self.q(x)), self.part
        if self.how == "weight":
            return F.linear(x, p.weight, p.bias)
        if self.how == "inner weight":
            return F.linear(x, p[0].weight) + p[2].bias
        if self.how in ("list", "loop"):
            for layer in p:
                x = layer(x)
            return x
        if self.how == "dict":
            return p["b"](p["a"](x))
        if self.how == "items":
            return sum(layer(x) * len(name) for name, layer in p.items())
        if self.how == "parameters":
            return x * p[0] + p[1]
        if self.how == "parameter dict":
            return x * p["a"]
        if self.how == "index":
            return p[2](p[0](x))
        if self.how == "slice":
            return p[:2](x)
        return p.score(x) if self.how == "method" else self.call(x)


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def score(self, x):
        return self.inner(x) * self.scale


@pytest.mark.filterwarnings("ignore:merging")
@pytest.mark.parametrize(
    "how",
    ["weight", "inner weight", "list", "dict", "items", "parameters", "parameter dict", "index", "slice", "loop",
     "method", "bound"],
)  # fmt: skip
def test_training_in_full_what_the_parent_reads(how, tmp_path):
    model, x = Reads(how), torch.randn(3, 6)
    adapted = rewritten(model, ["part"])
    used = {n for n, p in adapted.named_parameters() if p.requires_grad}
    adapted(x).sum().backward()
    missing = {n for n in used if adapted.get_parameter(n).grad is None}
    reference = copy.deepcopy(model)
    reference(x).sum().backward()
    never = {n for n, p in reference.named_parameters() if p.grad is None}
    assert {n.replace(".fxgraft.default", "") for n in missing} == never
    plain = copy.deepcopy(model)
    state = fg.adapter_state(adapted)
    plain.load_state_dict({n: state[n] for n in state if n.startswith("part.")}, strict=False)
    plain.q.weight.data += state["q.B"] @ state["q.A"]
    want = plain(x)
    assert not torch.allclose(want, model(x), atol=1e-3)
    torch.testing.assert_close(adapted(x), want)
    torch.testing.assert_close(fg.merge(adapted)(x), want)
    torch.testing.assert_close(fg.load_adapter(model, fg.save_adapter(adapted, tmp_path))(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(x), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(x), want)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))


@pytest.mark.parametrize("how", ["list", "dict", "loop"])
def test_lists_of_modules_for_peft(how, tmp_path):
    model, x = Reads(how), torch.randn(3, 6)
    adapted = rewritten(model, ["part"])
    fg.save_adapter(adapted, tmp_path, format="peft")
    torch.testing.assert_close(fg.load_adapter(model, tmp_path)(x), adapted(x))


def test_lists_of_parameters_are_not_for_peft(tmp_path):
    with pytest.raises(fg.CheckpointError, match="'part' is a list of parameters"):
        fg.save_adapter(rewritten(Reads("parameters"), ["part"]), tmp_path, format="peft")
