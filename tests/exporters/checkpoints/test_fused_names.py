"""Adapters that name q_proj and v_proj, on a model with a fused layer of the same weights, and the other way round."""

import json

import peft
import pytest
import torch
import transformers as hf
from methods import METHODS, graft
from small_models import perturb

import fxgraft as fg
from fxgraft.rewriter.state import record_of

SMALL = {
    "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
IDS = torch.tensor([[3, 14, 15, 9, 2]])
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def apart():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def fused(apart):
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL)).eval()
    state = apart.state_dict()
    for i in range(2):
        layer = f"model.layers.{i}"
        state[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat(
            [state.pop(f"{layer}.self_attn.{p}_proj.weight") for p in "qkv"]
        )
        halves = [state.pop(f"{layer}.mlp.{p}_proj.weight") for p in ("gate", "up")]
        state[f"{layer}.mlp.gate_up_proj.weight"] = torch.cat(halves)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, apart(IDS).logits, rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_from_layers_to_parts_and_back(apart, fused, method, tmp_path):
    adapted = perturb(graft(apart, fg.Spec(method, TARGETS, overrides={"layers.1.*": METHODS["lora"]}))).eval()
    fg.save_adapter(adapted, tmp_path / "a")
    opened = fg.load_adapter(fused, tmp_path / "a").eval()
    want = adapted(IDS).logits
    assert not torch.allclose(want, apart(IDS).logits, atol=1e-4)
    torch.testing.assert_close(opened(IDS).logits, want, rtol=1e-5, atol=1e-5)
    names = [site.name for site in record_of(opened, "default").sites]
    assert "model.layers.0.self_attn.qkv_proj[2]" in names and "model.layers.1.mlp.down_proj" in names
    fg.save_adapter(opened, tmp_path / "b")
    again = fg.load_adapter(fused, tmp_path / "b").eval()
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-5, atol=1e-5)
    back = fg.load_adapter(apart, tmp_path / "b").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_peft_folders_of_separate_layers(apart, fused, kind, tmp_path):
    import copy

    config = peft.LoraConfig(r=3, target_modules=TARGETS, rank_pattern={"v_proj": 2}, init_lora_weights=False)
    if kind == "vera":
        config = peft.VeraConfig(r=4, target_modules=["q_proj"], d_initial=0.5)
    theirs = perturb(peft.get_peft_model(copy.deepcopy(apart), config)).eval()
    theirs.save_pretrained(tmp_path)
    opened = fg.load_adapter(fused, tmp_path).eval()
    want = theirs(IDS).logits
    assert not torch.allclose(want, apart(IDS).logits, atol=1e-4)
    torch.testing.assert_close(opened(IDS).logits, want, rtol=1e-5, atol=1e-5)


def test_what_is_not_proved_is_refused_with_what_is_near(apart, fused, tmp_path):
    adapted = fg.rewrite(apart, fg.Spec(fg.LoRA(2), ["self_attn.o_proj", "q_proj"]))
    fg.save_adapter(adapted, tmp_path / "own")
    narrow = hf.Phi3ForCausalLM(
        hf.Phi3Config(**{**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    )
    with pytest.raises(fg.CheckpointError, match=r"\(32, 32\) there, \(16, 32\) here"):
        fg.load_adapter(narrow, tmp_path / "own")
    other = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=31, n_positions=16))
    with pytest.raises(fg.CheckpointError):
        fg.load_adapter(other, tmp_path / "own")

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(hf.LlamaForCausalLM(apart.config), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(fg.CheckpointError, match="do not name in this GPT2LMHeadModel"):
        fg.load_adapter(other, tmp_path / "peft")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {k: t for k, t in load_file(file).items() if "layers.1" not in k}
    save_file(tensors, file)
    with pytest.raises(
        fg.CheckpointError, match=r"lacks the tensors of 1 layer\(s\) it targets: 'model.layers.1.self_attn.q_proj'"
    ):
        fg.load_adapter(fused, tmp_path / "peft")


def test_unilora_of_peft_goes_by_an_order_that_is_not_known(apart, fused, tmp_path):
    config = peft.UniLoraConfig(r=2, target_modules=["q_proj"], theta_d_length=20, save_indices=True)
    peft.get_peft_model(hf.LlamaForCausalLM(apart.config), config).save_pretrained(tmp_path)
    with pytest.raises(fg.CheckpointError, match="order of the layers where it was trained"):
        fg.load_adapter(fused, tmp_path)


def test_rows_that_lie_elsewhere_are_refused(tmp_path):
    """One name and one size, and the heads' q, k and v together or apart."""
    together = {"vocab_size": 31, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "multi_query": False}
    model = hf.GPTBigCodeModel(hf.GPTBigCodeConfig(**together))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["q_proj"]))
    fg.save_adapter(adapted, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())["cuts"]["h.0.attn.c_attn"]
    assert told["parts"] == [4, 8, 8, 8] and told["names"][0][0] == "q_proj"
    blocks = hf.GPT2Model(hf.GPT2Config(**{k: v for k, v in together.items() if k != "multi_query"}))
    with pytest.raises(
        fg.CheckpointError, match="is cut into 3 parts of 8 in 4 stretches there, and into 3 parts of 32"
    ):
        fg.load_adapter(blocks, tmp_path)
