"""Random PEFT configs on several models: the folder opens with the numbers PEFT itself gives, or one of our errors.

In float64, so that equal means equal.
"""

import collections
import copy
import os
import random
import warnings

import pytest
import torch

import fxgraft as fg

peft = pytest.importorskip("peft")
SCALE = float(os.environ.get("FXGRAFT_CAMPAIGN_SCALE", "1"))
COUNT = int(40 * SCALE)  # of folders for each model
pytestmark = [pytest.mark.campaign, pytest.mark.filterwarnings("ignore")]
SIZES = {"vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0}


def llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, **SIZES,
    )  # fmt: skip
    targets = [
        "q_proj",
        "v_proj",
        "o_proj",
        "down_proj",
        "lm_head",
        "embed_tokens",
        "self_attn.k_proj",
        "1.mlp.up_proj",
    ]
    saved = ["lm_head", "embed_tokens", "norm", "model.norm", "layers.0.input_layernorm", "layers.2.mlp"]
    return LlamaForCausalLM(config), "CAUSAL_LM", targets, saved


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_labels=3, **SIZES
    )
    targets = ["query", "value", "dense", "output.dense", "intermediate.dense", "word_embeddings", "classifier"]
    saved = ["classifier", "pooler", "LayerNorm", "word_embeddings", "score", "layer.2.output"]
    return BertForSequenceClassification(config), "SEQ_CLS", targets, saved


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, **SIZES)
    targets = ["c_attn", "c_proj", "c_fc", "attn.c_proj", "lm_head", "wte"]
    return GPT2LMHeadModel(config), "CAUSAL_LM", targets, ["lm_head", "wte", "ln_f", "mlp"]


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, vocab_size=64)
    targets = ["q", "v", "wi", "wo", "lm_head", "shared", "SelfAttention.k", "EncDecAttention.q"]
    return T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM", targets, ["lm_head", "shared", "final_layer_norm"]


MODELS = {"llama": lambda: llama(False), "tied llama": lambda: llama(True), "bert": bert, "gpt2": gpt2, "t5": t5}


def drawn(rng, task, targets, saved):
    """A config, and how it is saved."""
    config = {"r": rng.randint(1, 4), "lora_alpha": rng.choice([1, 4, 16, 6.5]), "init_lora_weights": False}
    patterns = ["all-linear", r".*\.[01]\..*(q|query|q_proj|c_attn|wi|v_proj)"]
    listed = rng.sample(targets, rng.randint(1, 3))
    config["target_modules"] = rng.choice(patterns) if rng.random() < 0.2 else listed
    chances = {
        "modules_to_save": (0.3, lambda: rng.sample(saved, rng.randint(1, 2))),
        "rank_pattern": (0.3, lambda: {rng.choice(targets): rng.randint(1, 6), ".*1.*": 3}),
        "alpha_pattern": (0.3, lambda: {rng.choice(targets): rng.choice([2, 32])}),
        "layers_to_transform": (0.2, lambda: rng.choice([0, [1], [0, 2]])),
        "layers_pattern": (0.1, lambda: rng.choice(["layers", "layer", "h", "block", ["layers", "layer"]])),
        "exclude_modules": (0.2, lambda: rng.choice([[rng.choice(targets)], r".*\.2\..*", []])),
        "use_rslora": (0.2, lambda: True),
        "bias": (0.1, lambda: rng.choice(["all", "lora_only"])),
        "use_dora": (0.05, lambda: True),
        "lora_bias": (0.05, lambda: True),
        "task_type": (0.3, lambda: task),
        "ensure_weight_tying": (0.15, lambda: True),
        "trainable_token_indices": (0.05, lambda: [1, 2]),
    }
    config |= {key: draw() for key, (chance, draw) in chances.items() if rng.random() < chance}
    return config, rng.choice([{}, {}, {"save_embedding_layers": True}, {"save_embedding_layers": False}])


def saved_by_peft(base, config, options, folder, inputs):
    """What the folder PEFT writes means to PEFT."""
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(config)), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.eval().double().save_pretrained(str(folder), **options)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), autocast_adapter_dtype=False)
    return again.eval().double()(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_random_peft_folders(name, tmp_path):
    torch.manual_seed(0)
    base, task, targets, saved = MODELS[name]()
    base = base.double().eval()
    ids = torch.randint(3, 64, (2, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    tally, wrong = collections.Counter(), []
    for seed in range(COUNT):
        rng, folder = random.Random(f"{name} {seed}"), tmp_path / str(seed)
        config, options = drawn(rng, task, targets, saved)
        try:
            expected = saved_by_peft(base, config, options, folder, inputs)
        except Exception:
            tally["refused by PEFT"] += 1
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ours = fg.load_adapter(base, folder)
        except fg.CheckpointError:
            tally["refused"] += 1
            continue
        tally["opened"] += 1
        got = ours(**inputs).logits
        if (got - expected).abs().max() > 1e-9 * expected.abs().max():
            wrong.append((seed, config, options))
    print(f"{name}: {dict(tally)}")
    assert not wrong, f"{len(wrong)} of {tally['opened']} folders opened with other numbers: {wrong[:3]}"
    assert tally["opened"] > COUNT / 4
