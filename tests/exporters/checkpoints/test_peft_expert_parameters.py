"""Adapters on experts from and to PEFT's `target_parameters`, held against PEFT itself."""

from __future__ import annotations

import json

import pytest
import torch
from expert_models import EXPERTS, made, tokens
from safetensors.torch import load_file, save_file
from small_models import noisy, relative_error

import fxgraft as fg

peft = pytest.importorskip("peft")
TARGETS = {
    "mixtral": (["q_proj"], ["gate_up_proj", "down_proj", "gate.weight"]),
    "gpt_oss": ([], ["experts.down_proj", "mlp.experts.gate_up_proj"]),
    "llama4": (["q_proj"], ["feed_forward.experts.down_proj", "gate_up_proj"]),
    "jetmoe": ([], ["input_linear.weight", "output_linear.weight"]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_peft_trained_opens_with_the_numbers_of_peft(name, tmp_path):
    modules, parameters = TARGETS[name]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, target_parameters=parameters, rank_pattern={"down_proj": 2}
    )
    theirs = peft.get_peft_model(made(EXPERTS[name]), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        expected = theirs(input_ids=tokens()).logits
    theirs.save_pretrained(tmp_path)
    model = made(EXPERTS[name])
    ours = fg.load_adapter(model, tmp_path)
    assert relative_error(ours(tokens()).logits, expected.double()) < 1e-5
    assert relative_error(model(tokens()).logits, expected.double()) > 1e-3
    fg.save_adapter(ours, tmp_path / "again", format="peft")  # every key and number as PEFT wrote it
    first, second = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", EXPERTS)
def test_peft_opens_what_is_written_here(name, tmp_path):
    modules = ["q_proj", "kv_proj"] if name == "jetmoe" else ["q_proj", "gate_up_proj", "down_proj"]
    targets = ["input_linear", "output_linear", "kv_proj"] if name == "jetmoe" else modules
    spec = fg.Spec(fg.LoRA(rank=3), targets=targets, overrides={"layers.1.*": fg.LoRA(rank=2, alpha=3)})
    ours = noisy(fg.rewrite(made(EXPERTS[name]), spec), "default", 3)
    fg.save_adapter(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(made(EXPERTS[name]), tmp_path).eval()
    with torch.no_grad():
        assert relative_error(theirs(input_ids=tokens()).logits, ours(tokens()).logits.double()) < 1e-5


def test_damaged_and_impossible_folders_are_refused(tmp_path):
    ours = fg.rewrite(made(EXPERTS["mixtral"]), fg.Spec(fg.LoRA(rank=3), targets=["gate_up_proj", "down_proj"]))
    fg.save_adapter(ours, tmp_path, format="peft")
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    save_file({k: t for k, t in whole.items() if k != key}, file)
    with pytest.raises(fg.CheckpointError, match=r"lacks.*experts.base_layer.lora_A"):
        fg.load_adapter(made(EXPERTS["mixtral"]), tmp_path)
    save_file(whole | {key: torch.zeros(11, 24)}, file)
    with pytest.raises(fg.CheckpointError, match=r"gate_up_proj.*fit no rank"):
        fg.load_adapter(made(EXPERTS["mixtral"]), tmp_path)
    save_file(whole, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["down_proj"]}))
    with pytest.raises(fg.CheckpointError, match="base_layer"):
        fg.load_adapter(made(EXPERTS["mixtral"]), tmp_path)
    dropped = fg.rewrite(made(EXPERTS["mixtral"]), fg.Spec(fg.LoRA(rank=3, dropout=0.1), targets=["down_proj"]))
    with pytest.raises(fg.CheckpointError, match="no dropout beside parameters"):
        fg.save_adapter(dropped, tmp_path / "b", format="peft")
    vera = fg.rewrite(made(EXPERTS["mixtral"]), fg.Spec(fg.VeRA(rank=3), targets=["down_proj"]))
    with pytest.raises(fg.CheckpointError, match="down_proj"):
        fg.save_adapter(vera, tmp_path / "b", format="peft")
