"""Language models with a cache at tiny size, one per family: what generates, and from what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: What most configs call their sizes. Windows are shorter than the prompt, so that they are left behind at once.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
HYBRID = ["linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 100,
    "max_position_embeddings": 64, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100,
    "decoder_start_token_id": 0, "pad_token_id": 0, "initializer_factor": 3.0,
}  # fmt: skip
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 64, "suppress_tokens": None,
           "begin_suppress_tokens": None}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model of transformers by its class and config, and what an adapter goes into."""

    kind: str
    config: dict[str, Any]
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    source: str = "input_ids"  # what the encoder of an encoder-decoder takes


def _decoder(kind: str, targets: tuple[str, ...] = ("q_proj", "v_proj"), **more: Any) -> Family:
    return Family(kind, {**SIZES, **more}, targets)


FAMILIES: dict[str, Family] = {
    "llama": _decoder("Llama"),
    "gpt2": Family(
        "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 128,
                 "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}, ("c_attn", "c_fc")),
    "opt": Family("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": _decoder("GPTNeoX", ("query_key_value", "dense")),
    "falcon": Family("Falcon", {k: v for k, v in SIZES.items() if k != "head_dim"}, ("query_key_value", "dense")),
    "bloom": Family("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100,
                              "initializer_range": 0.3}, ("query_key_value", "dense")),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "phi3": _decoder("Phi3", ("o_proj", "down_proj")),
    "cohere": _decoder("Cohere"),
    "mistral": _decoder("Mistral", sliding_window=4),
    "gemma2": _decoder("Gemma2", sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": _decoder("Gemma3", sliding_window=4, query_pre_attn_scalar=8, layer_types=SLIDING),
    "cohere2": _decoder("Cohere2", sliding_window=4, layer_types=SLIDING),
    "gpt_oss": _decoder("GptOss", sliding_window=4, layer_types=SLIDING, **EXPERTS),
    "olmo3": _decoder("Olmo3", sliding_window=4, layer_types=SLIDING),
    "mixtral": _decoder("Mixtral", **EXPERTS),
    "llama4": _decoder("Llama4", attention_chunk_size=4, no_rope_layers=[1, 0], intermediate_size_mlp=48,
                       interleave_moe_layer_step=3),
    "mamba": _decoder("Mamba", ("in_proj", "out_proj"), state_size=8, conv_kernel=4, expand=2, time_step_rank=4),
    "falcon_mamba": _decoder("FalconMamba", ("in_proj", "out_proj"), state_size=8, conv_kernel=4, time_step_rank=4),
    "mamba2": _decoder("Mamba2", ("in_proj", "out_proj"), state_size=8, conv_kernel=4, expand=2, num_heads=8,
                       head_dim=8, n_groups=2, chunk_size=4),
    "jamba": _decoder("Jamba", ("q_proj", "in_proj"), attn_layer_period=2, attn_layer_offset=1,
                      expert_layer_period=4, expert_layer_offset=3, mamba_dt_rank=4, use_mamba_kernels=False, **MAMBA),
    "bamba": _decoder("Bamba", ("q_proj", "in_proj"), attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
                      mamba_n_groups=2, mamba_chunk_size=4, **MAMBA),
    "qwen3_next": _decoder("Qwen3Next", ("q_proj", "in_proj_qkvz"), layer_types=HYBRID, linear_num_value_heads=4,
                           linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                           linear_conv_kernel_dim=4, mlp_only_layers=[0, 1], **EXPERTS),
    "zamba2": _decoder("Zamba2", ("q_proj", "in_proj"), mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=8,
                       chunk_size=4, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, **MAMBA),
    "falcon_h1": _decoder("FalconH1", ("q_proj", "in_proj"), mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64,
                          mamba_n_groups=2, mamba_chunk_size=4, **MAMBA),
    "lfm2": _decoder("Lfm2", ("q_proj", "in_proj"), layer_types=["conv", "full_attention"], conv_L_cache=3),
    "recurrent_gemma": _decoder("RecurrentGemma", ("q_proj", "linear_x"), attention_window_size=4, lru_width=32,
                                block_types=["recurrent", "attention"]),
    "t5": Family("T5", T5, ("q", "v")),
    "mt5": Family("MT5", {**T5, "feed_forward_proj": "gated-gelu"}, ("q", "v")),
    "bart": Family("Bart", {**SEQ2SEQ, "init_std": 0.6}, ("q_proj", "v_proj", "fc1", "fc2")),
    "mbart": Family("MBart", SEQ2SEQ),
    "marian": Family("Marian", SEQ2SEQ),
    "pegasus": Family("Pegasus", SEQ2SEQ),
    "m2m100": Family("M2M100", SEQ2SEQ),
    "whisper": Family("Whisper", WHISPER, source="input_features"),
}  # fmt: skip
#: The class is called otherwise than `<kind>ForCausalLM`.
_CLASSES = {
    "GPT2": "GPT2LMHeadModel", "Marian": "MarianMTModel", "T5": "T5ForConditionalGeneration",
    "MT5": "MT5ForConditionalGeneration", "Bart": "BartForConditionalGeneration",
    "MBart": "MBartForConditionalGeneration", "Pegasus": "PegasusForConditionalGeneration",
    "M2M100": "M2M100ForConditionalGeneration", "Whisper": "WhisperForConditionalGeneration",
}  # fmt: skip
_TEXT = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}


def build(name: str, **changed: Any) -> nn.Module:
    """A random model of a family, in eval mode."""
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, _TEXT.get(family.kind, f"{family.kind}Config"))(**{**family.config, **changed})
    made: Callable[[Any], nn.Module] = getattr(transformers, _CLASSES.get(family.kind, f"{family.kind}ForCausalLM"))
    model = made(config).eval()
    if "num_experts_per_tok" in family.config:
        model.set_experts_implementation("batched_mm")
    return model


def source(name: str, batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """A prompt, padded on the left in its last row; of an encoder-decoder what the encoder reads."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[name].source == "input_features":
        return {"input_features": torch.randn(batch, 8, 12, generator=generator)}
    ids = torch.randint(4, 100, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_torch(model: nn.Module, given: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    """Greedy tokens of `generate()`, without an end."""
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0)
    if "input_features" in given:  # Whisper's leaves the first token out
        made = torch.cat([torch.full_like(made[:, :1], model.config.decoder_start_token_id), made], dim=1)
    return made
