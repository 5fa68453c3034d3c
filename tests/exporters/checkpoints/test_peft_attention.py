"""PEFT's LoRA on a whole nn.MultiheadAttention: its folders open, ours open there, what it cannot hold is said."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import perturb
from torch import nn

import fxgraft as fg

peft = pytest.importorskip("peft")


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True, bias=False) for _ in range(2))
        self.lin = nn.Linear(8, 5)

    def forward(self, x, memory):
        for attention in (self.mha, *self.blocks):
            x = x + attention(x, memory, memory)[0]
        return self.lin(x)


class Mixed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.mha = layer, nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.layer(x)
        return self.mha(x, x, x)[0]


@pytest.fixture
def given():
    return torch.randn(2, 3, 8), torch.randn(2, 4, 8)


def theirs_of(model, folder, **config):
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, **config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["mha", "lin"]},
        {"target_modules": ["mha", "0", "1"], "rank_pattern": {"mha": 3}, "alpha_pattern": {"blocks.0": 5}},
        {"target_modules": r".*blocks\.\d", "use_rslora": True},
    ],
    ids=lambda c: str(c["target_modules"]),
)
def test_their_folders_open_and_ours_open_there(config, given, tmp_path):
    model = Attends().eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    theirs = theirs_of(model, tmp_path / "theirs", **config)
    base = Attends().eval()
    base.load_state_dict(state)
    with pytest.warns(UserWarning, match="out_proj twice"):
        ours = fg.load_adapter(base, tmp_path / "theirs")
    assert not torch.allclose(ours(*given), base(*given), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), theirs(*given))
    written = perturb(ours, 0.03)
    fg.save_adapter(written, tmp_path / "ours", format="peft")
    again = Attends().eval()
    again.load_state_dict(state)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        back = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
        torch.testing.assert_close(back(*given), written(*given))
    with pytest.warns(UserWarning, match="out_proj twice"):
        opened = fg.load_adapter(base, tmp_path / "ours")
    torch.testing.assert_close(opened(*given), written(*given))


@pytest.mark.parametrize(
    ("targets", "overrides", "said"),
    [
        (["mha.out_proj", "lin"], {}, "without calling them"),
        (["mha.in_proj_weight", "mha.out_proj"], {"mha.out_proj": fg.LoRA(rank=3)}, "one rank and alpha"),
        ([fg.Target("mha.in_proj_weight", parts=3), "mha.out_proj"], {}, "whole layers"),
    ],
)
def test_what_peft_cannot_hold(targets, overrides, said, tmp_path):
    adapted = fg.rewrite(Attends(), fg.Spec(fg.LoRA(rank=2), targets, overrides=overrides))
    with pytest.raises(fg.CheckpointError, match=said):
        fg.save_adapter(adapted, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


def test_other_methods_and_weights_apart(tmp_path):
    adapted = fg.rewrite(Attends(), fg.Spec(fg.VeRA(rank=2), ["mha.in_proj_weight", "mha.out_proj"]))
    with pytest.raises(fg.CheckpointError, match="without calling them"):
        fg.save_adapter(adapted, tmp_path, format="peft")
    apart = fg.rewrite(Attends(kdim=6), fg.Spec(fg.LoRA(rank=2), ["q_proj_weight", "mha.out_proj"]))
    with pytest.raises(fg.CheckpointError, match="without calling them"):
        fg.save_adapter(apart, tmp_path, format="peft")


def test_the_packed_weight_alone_is_a_parameter(given, tmp_path):
    """PEFT's `target_parameters`."""
    model = Attends().eval()
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["mha.in_proj_weight", "lin"])))
    fg.save_adapter(adapted, tmp_path, format="peft")
    torch.testing.assert_close(fg.load_adapter(model, tmp_path)(*given), adapted(*given))
    want = adapted(*given).detach()
    with torch.no_grad():
        torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path).train()(*given), want)


def test_a_folder_without_the_output_projection(given, tmp_path):
    from safetensors.torch import load_file, save_file

    model = Attends()
    theirs_of(model, tmp_path, target_modules=["mha"])
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "out_proj" not in k}, file)
    with pytest.raises(fg.CheckpointError, match=r"lacks .*mha\.base_layer\.out_proj: lora_A"):
        fg.load_adapter(Attends(), tmp_path)


def test_all_biases_trained_with_an_attention_go_both_ways(given, tmp_path):
    model = Attends().eval()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["mha", "lin"], bias="all"))
    with torch.no_grad():
        for _, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="out_proj twice"):
        ours = fg.load_adapter(model, tmp_path / "theirs")
    fg.save_adapter(ours, tmp_path / "ours", format="peft")
    first, second = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert first.keys() == second.keys() and "base_model.model.mha.base_layer.out_proj.base_layer.bias" in first
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(again(*given), ours(*given))
    del first["base_model.model.lin.base_layer.bias"]
    save_file(first, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(fg.CheckpointError, match=r"bias='all'.*stores none of 'lin.bias'"):
        fg.load_adapter(model, tmp_path / "theirs")


def test_deltas_that_peft_transposes_are_refused(tmp_path):
    theirs_of(Attends(), tmp_path, target_modules=["mha"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    with pytest.raises(fg.CheckpointError, match=r"fan_in_fan_out=True .* transposes the deltas .* \('mha'\)"):
        fg.load_adapter(Attends(), tmp_path)


def test_an_attention_beside_a_conv1d_is_not_written(tmp_path):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = Mixed(Conv1D(8, 8))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["layer", "mha.in_proj_weight", "mha.out_proj"]))
    with pytest.raises(fg.CheckpointError, match=r"beside Conv1D .* transposes the deltas .* \('mha'\)"):
        fg.save_adapter(adapted, tmp_path / "peft", format="peft")
