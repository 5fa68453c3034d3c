"""Adapter folders as they are found: other keys, other configs, base weights that came along."""

import copy
import json
import warnings

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS
from author_folders import SITES, Net, P, base, hydralora, latent, prolora, run
from safetensors.torch import load_file, save_file
from torch import nn

import fxgraft as fg

peft = pytest.importorskip("peft")


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(4, 7, dtype=torch.float64)


def made(model, folder, save=None, **config):
    """PEFT's model over a copy, with values that show, and its folder."""
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(folder), **(save or {}))
    return theirs


def renamed(folder, rename, config=None):
    tensors = {rename(k): t for k, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    if config:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **config}))


def agree(ours, theirs, ids):
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


# -- keys ----------------------------------------------------------------------------------------------------------
LORA_KEYS = {
    "default": lambda k: k.replace(".weight", ".default.weight"),
    "another name": lambda k: k.replace(".weight", ".my-run_2.weight"),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "DDP": lambda k: f"module.{k}",
    "compiled": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda k: k.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
}


@pytest.mark.parametrize("keys", LORA_KEYS)
def test_keys_of_one_adapter_in_every_form(llama, ids, tmp_path, keys):
    theirs = made(llama, tmp_path, target_modules=["q_proj"])
    renamed(tmp_path, LORA_KEYS[keys])
    agree(fg.load_adapter(llama, tmp_path), theirs, ids)


@pytest.mark.parametrize("make", [hydralora, latent, prolora])
@pytest.mark.parametrize("name", [None, "default", "b"])
def test_the_forks_keys_with_and_without_an_adapter_name(net, x, tmp_path, make, name):
    expected = fg.load_adapter(net, make(tmp_path / "a"))(x)

    def rename(key):
        plain = key.replace(".default.", ".").removesuffix(".default").replace(".default_lora_latent", "_lora_latent")
        if name is None:
            return plain
        if "_lora_latent" in plain:
            return plain.replace("_lora_latent", f".{name}_lora_latent")
        return plain.replace(".weight", f".{name}.weight") if plain.endswith(".weight") else f"{plain}.{name}"

    renamed(tmp_path / "a", rename)
    assert torch.equal(fg.load_adapter(net, tmp_path / "a")(x), expected)


def test_two_adapters_in_one_file_are_refused(llama, tmp_path):
    made(llama, tmp_path, target_modules=["q_proj"])
    renamed(tmp_path, lambda k: k.replace(".weight", ".a.weight" if "layers.0" in k else ".b.weight"))
    with pytest.raises(fg.CheckpointError, match="tensors of several adapters, 'a', 'b'"):
        fg.load_adapter(llama, tmp_path)


def test_two_keys_for_one_tensor_are_refused(llama, tmp_path):
    made(llama, tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(iter(tensors))
    save_file({**tensors, key.replace(".weight", ".default.weight"): tensors[key] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(fg.CheckpointError, match="two tensors for"):
        fg.load_adapter(llama, tmp_path)


def test_a_mapping_without_its_layer_is_refused(net, tmp_path):
    folder = latent(tmp_path / "a")
    renamed(folder, lambda k: k.replace("layers.up.default_lora_latent", "layers.off.default_lora_latent"))
    with pytest.raises(fg.CheckpointError, match="belongs to no layer"):
        fg.load_adapter(net, folder)


def test_an_adapter_in_a_folder_of_its_name(llama, ids, tmp_path):
    theirs = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "mine"
    ).eval()
    theirs.save_pretrained(str(tmp_path))
    assert (tmp_path / "mine" / CONFIG).is_file()
    agree(fg.load_adapter(llama, tmp_path), theirs, ids)


# -- base weights that came along ------------------------------------------------------------------------------------
@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def lm(request):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=90, tie_word_embeddings=request.param)).eval()


@pytest.mark.parametrize("saved", ["auto", True, False])
def test_the_output_head_as_target(lm, ids, tmp_path, saved):
    options = {"save_embedding_layers": saved}
    theirs = made(lm, tmp_path, options, target_modules=["q_proj", "lm_head"])
    stored = "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    assert stored == (saved is not False)
    agree(fg.load_adapter(lm, tmp_path), theirs, ids)


def test_a_head_over_another_base_is_refused(llama, tmp_path):
    made(llama, tmp_path, target_modules=["q_proj", "lm_head"])
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    with pytest.raises(fg.CheckpointError, match=r"base weight under its adapter, 'lm_head\.weight', and it is"):
        fg.load_adapter(other, tmp_path)


def test_stored_embeddings_that_are_the_models_own(lm, ids, tmp_path):
    theirs = made(lm, tmp_path, {"save_embedding_layers": True}, target_modules=["q_proj"])
    ours = fg.load_adapter(lm, tmp_path)
    agree(ours, theirs, ids)
    assert fg.rewriter.state.record_of(ours, "default").train == ()


def test_stored_embeddings_of_a_resized_vocabulary(lm, tmp_path):
    """New rows are drawn anew at every resize: those in the folder are the ones the adapter was trained with."""
    theirs = copy.deepcopy(lm)
    theirs.resize_token_embeddings(95)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[90:] += 1
    theirs = made(theirs, tmp_path, {"save_embedding_layers": True}, target_modules=["q_proj"])
    with pytest.raises(fg.CheckpointError, match=r"\(95, 32\), this model's is \(90, 32\).*resize_.*\(95\)"):
        fg.load_adapter(lm, tmp_path)
    lm.resize_token_embeddings(95)
    agree(fg.load_adapter(lm, tmp_path), theirs, torch.randint(88, 95, (2, 7)))


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_trained_embeddings(lm, ids, tmp_path, saved, ensure):
    tied = lm.config.tie_word_embeddings
    theirs = made(lm, tmp_path, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=ensure and tied)
    ours = fg.load_adapter(lm, tmp_path)
    agree(ours, theirs, ids)
    embedding = ours.model.embed_tokens._modules.get("fxgraft")
    if tied and ensure:  # they train on as one
        assert ours.lm_head.fxgraft.default.weight is embedding.default.weight
    elif len(saved) == 2:
        assert not torch.equal(ours.lm_head.fxgraft.default.weight, embedding.default.weight)


def test_a_trained_module_inside_another_is_refused(bert, tmp_path):
    """PEFT wraps both, stores them under one name, and cannot open that itself."""
    made(bert, tmp_path, target_modules=["value"], modules_to_save=["LayerNorm", "layer.1.output"])
    with pytest.raises(fg.CheckpointError, match=r"layer\.1\.output\.LayerNorm' inside a module that it names too"):
        fg.load_adapter(bert, tmp_path)


def test_a_lora_on_an_embedding(llama, ids, tmp_path):
    llama = copy.deepcopy(llama)
    theirs = made(llama, tmp_path, target_modules=["q_proj", "embed_tokens"])
    if llama.model.embed_tokens.padding_idx is not None:
        with pytest.raises(fg.CheckpointError, match=r"changes row .* 'model\.embed_tokens', its padding_idx"):
            fg.load_adapter(llama, tmp_path)
        llama.model.embed_tokens.padding_idx = None
    agree(fg.load_adapter(llama, tmp_path), theirs, ids)


def test_a_head_that_peft_stores_twice(lm, ids, tmp_path):
    options = {"save_embedding_layers": True}
    theirs = made(lm, tmp_path, options, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.modules_to_save.weight" in load_file(tmp_path / WEIGHTS)
    agree(fg.load_adapter(lm, tmp_path), theirs, ids)


def test_a_raw_state_dict(llama, ids, tmp_path):
    """What `torch.save(model.state_dict())` of a PEFT model holds: adapter names, base layers, originals."""
    theirs = made(llama, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_file({k: t.clone() for k, t in theirs.state_dict().items()}, tmp_path / WEIGHTS)
    agree(fg.load_adapter(llama, tmp_path), theirs, ids)


# -- attention -------------------------------------------------------------------------------------------------------
class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.lin(self.mha(x, x, x)[0])


def test_an_adapter_on_an_output_projection_that_is_never_called(tmp_path):
    model, x = Attends().eval(), torch.randn(2, 3, 8)
    theirs = made(model, tmp_path, target_modules=["out_proj", "lin"])
    with pytest.warns(UserWarning, match="never calls 'mha.out_proj'"):
        ours = fg.load_adapter(model, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))
    made(model, tmp_path / "b", target_modules=["out_proj"])
    with pytest.raises(fg.CheckpointError, match="does nothing"):
        fg.load_adapter(model, tmp_path / "b")


# -- configs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config",
    [
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"ensure_weight_tying": True},
        {"megatron_config": None, "loftq_config": {}, "layer_replication": None, "use_bdlora": None},
    ],
)
def test_configs_that_change_no_number(llama, ids, tmp_path, config):
    theirs = made(llama, tmp_path, target_modules=["q_proj"])
    renamed(tmp_path, str, config)
    agree(fg.load_adapter(llama, tmp_path), theirs, ids)


@pytest.mark.parametrize(
    "config",
    [
        {"runtime_config": {"something_new": True}},
        {"use_dora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"kasa_config": {"a": 1}},
        {"use_foo": True},
        {"trainable_token_indices": [1]},
        {"bias": "some"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_configs_that_would_change_numbers(llama, tmp_path, config):
    made(llama, tmp_path, target_modules=["q_proj"])
    renamed(tmp_path, str, config)
    with pytest.raises(fg.CheckpointError, match=next(iter(config))):
        fg.load_adapter(llama, tmp_path)


@pytest.mark.parametrize("make", [hydralora, latent, prolora])
def test_targets_of_the_forks_are_honoured(net, tmp_path, make):
    folder = make(tmp_path / "a")
    renamed(folder, str, {"target_modules": ["up"]})
    with pytest.raises(fg.CheckpointError, match=r"target_modules=\['up'\] do not name: 'layers.down'"):
        fg.load_adapter(net, folder)


# -- PRoLoRA -----------------------------------------------------------------------------------------------------------
SWITCHES = {
    "as the authors write it": (
        {"enable_lora_rotation": True, "enable_lora_vec": True, "init2zero_via_vec": False},
        None,
    ),
    "its own steps": ({"lora_A_shift_size": 1, "lora_B_shift_size": 1}, None),
    "no rotation": ({"enable_lora_rotation": False, "lora_A_shift_size": 1, "lora_B_shift_size": 1}, (0, 0)),
    "other steps": ({"lora_A_shift_size": 2, "lora_B_shift_size": 1}, (2, 1)),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_prolora_rotations(net, x, tmp_path, switch):
    config, steps = SWITCHES[switch]
    folder = prolora(tmp_path / "a", 5, 2, 3, 4, **config)
    tensors = load_file(folder / WEIGHTS)
    a, b = steps or (1, 1)

    def layer(name, x):
        out, width = SITES[name]
        A0, B0 = (tensors[f"{P}{name}.lora_{letter}.default.weight"].double() for letter in "AB")
        A = torch.cat([torch.roll(A0, -k * a, 0) for k in range(3)], 1)[:, :width]
        B = torch.cat([torch.roll(B0, -k * b, 1) for k in range(4)], 0)[:out]
        A = torch.cat([A, tensors[f"{P}{name}.lora_A_vec.default"].double()])
        B = torch.cat([B, tensors[f"{P}{name}.lora_B_vec.default"].double().T], 1)
        return base(net, name, x) + 8 / 5 * (x @ A.T @ B.T)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = fg.load_adapter(net, folder)
    torch.testing.assert_close(loaded(x), run(net, x, layer), rtol=1e-6, atol=1e-6)
    kind = type(fg.rewriter.state.record_of(loaded, "default").groups[0].method)
    assert kind is (fg.PRoLoRA if steps is None else fg.LoRA)
    assert any("not rotated" in str(w.message) for w in caught) == (steps is not None)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"enable_lora_vec": False}, "enable_lora_vec=False and unshared_r=2"),
        ({"init2zero_via_vec": True}, "init2zero_via_vec=True"),
        ({"enable_lora_bias": True}, "enable_lora_bias=True"),
        ({"lora_A_shift_size": "1"}, "'lora_A_shift_size' is '1'"),
        ({"enable_lora_rotation": 1}, "'enable_lora_rotation' is 1"),
    ],
)
def test_prolora_switches_that_are_refused(net, tmp_path, config, says):
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(net, prolora(tmp_path / "a", **config))


def test_peft_unilora_with_more_entries_than_places(llama, ids, tmp_path):
    config = peft.UniLoraConfig(r=2, theta_d_length=3000, target_modules=["q_proj"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = fg.load_adapter(llama, tmp_path)
    assert fg.adapter_state(ours)["theta"].numel() == 3000 > 2 * 2 * 64
    agree(ours, theirs, ids)
    assert not torch.equal(ours(ids).logits, llama(ids).logits)
