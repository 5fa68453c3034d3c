"""Models that transformers quantises with bitsandbytes: QLoRA from loading to the merged model, and PEFT beside it."""

from __future__ import annotations

import warnings

import pytest
import torch
from quantised_layers import FEATURES, HIDDEN
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BITS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
             "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}  # fmt: skip
IDS = torch.arange(16).reshape(2, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=FEATURES, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder, bits):
    config = transformers.BitsAndBytesConfig(**BITS[bits])
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_qlora_from_loading_to_merging(bits, checkpointing, folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(loaded(folder, bits), use_gradient_checkpointing=checkpointing)
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(4), ["all-linear"]))
    assert len(record_of(adapted, "default").sites) == 14
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        gradient_checkpointing=checkpointing, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=adapted, args=arguments, train_dataset=data)
    trainer.train()
    trained = [p for n, p in adapted.named_parameters() if p.requires_grad and n.endswith("B")]
    assert trained and all(p.any() for p in trained)
    trainer.save_model(tmp_path / "saved")
    adapted.eval()
    with torch.no_grad():
        assert torch.equal(fg.load_adapter(model, tmp_path / "saved").eval()(IDS).logits, adapted(IDS).logits)
        plain = fg.merge(adapted, dtype=torch.float32)
        assert not getattr(plain, "is_quantized", False)
        assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
        adapted.train()
        torch.testing.assert_close(plain(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5)
        plain.save_pretrained(tmp_path / "merged")
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(IDS).logits, plain(IDS).logits)
    assert adapted.is_quantized
    assert not model.__dict__.get("_hf_peft_config_loaded")
    fg.remove(adapted, "default")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=adapted, args=arguments, train_dataset=data)


@pytest.mark.parametrize("bits", BITS)
def test_peft_s_folder_computes_what_peft_does(bits, folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(loaded(folder, bits), config)
    theirs.save_pretrained(tmp_path)
    ours = fg.load_adapter(loaded(folder, bits), tmp_path)
    gradients = []
    for model in (theirs.train(), ours.train()):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        named = {n.split("layers.")[1]: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append((out.logits.detach(), sorted(named.items())))
    (wanted, first), (given, second) = gradients
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    assert len(first) == len(second) == 8
    for (_, a), (_, b) in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_generates_and_swaps(folder, tmp_path):
    model = loaded(folder, "4bit").eval()
    adapted = fg.rewrite(model, fg.Spec(fg.UniLoRA(rank=2, vector_length=32, init_bound=0.5), ["all-linear"]))
    (vector,) = [p for p in adapted.parameters() if p.requires_grad]
    assert vector.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path)
    tokens = adapted.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 11)
    kept = adapted(IDS).logits
    with torch.no_grad():
        vector.zero_()
    assert not torch.equal(adapted(IDS).logits, kept)
    fg.swap(adapted, tmp_path)
    assert torch.equal(adapted(IDS).logits, kept)
