"""Models of transformers made tiny from their config alone: every size that is known by name is reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import BATCH, IMAGE, TOKENS, VOCABULARY

# -- transformers ------------------------------------------------------------------------------------------------------
# What a size is called, and how large it may be. Fields of other names keep their defaults.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("hidden_dim", "decoder_hidden_size", "conv_dim_", "projection_dim", "mlp_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "expert_layer_period"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_shared_experts"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "ffn_intermediate"), 32
    ),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "seq_length", "max_seq_len"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "attention_window_"), 4),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_dt_rank", "time_step_rank", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_labels"), 1),
    "image_size": IMAGE,
    "patch_size": 8,
    "vocab_size": VOCABULARY,
    "lru_width": 32,
    "num_mel_bins": 16,
    "max_image_size": IMAGE,
}


def _shrunk(config: Any, changes: dict[str, Any]) -> Any:
    """A config of the same class with every size of `_SIZES` reduced, and the changes; inner configs likewise."""
    values: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        inner = getattr(config, key, None)
        if hasattr(inner, "to_dict") and key.endswith("config"):
            values[key] = _shrunk(inner, changes.get(key, {})).to_dict()
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            values[key] = min(value, _SIZES[key]) if value > 0 else value
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(config.to_dict().get(key), int):
            values[key] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}[key]
    values |= {
        key: value for key, value in changes.items() if not isinstance(value, dict) or not key.endswith("config")
    }
    return type(config)(**values)


def from_config(kind: str, auto: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = _shrunk(transformers.AutoConfig.for_model(kind), changes)
        return getattr(transformers, auto).from_config(config, attn_implementation=changes.get("attention", "eager"))

    return build


def tokens(model: nn.Module) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY - 1, (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ids(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY - 1, (BATCH, TOKENS))}


def both(model: nn.Module) -> dict[str, Any]:
    return {**tokens(model), **_decoded()}


def pixels(model: nn.Module, size: int = IMAGE) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def wave(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 1600)}


def _decoded() -> dict[str, Any]:
    return {"decoder_input_ids": torch.randint(3, VOCABULARY - 1, (BATCH, 5))}


def mel(model: nn.Module) -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 16, 128), **_decoded()}


def filterbanks(model: nn.Module) -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 32, 16), **_decoded()}


def dbrx() -> nn.Module:
    from transformers import DbrxConfig, DbrxForCausalLM

    sizes: Any = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=VOCABULARY, ffn_config=sizes, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    )  # fmt: skip
    return DbrxForCausalLM(config)


CAUSAL: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in (
        "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
        "gpt_oss", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "bloom", "falcon", "mpt", "opt", "phi", "phi3", "phimoe",
        "olmo2", "olmoe", "cohere", "cohere2", "starcoder2", "stablelm", "granite", "granitemoe", "glm4", "glm4_moe",
        "smollm3", "mamba", "falcon_mamba", "rwkv", "codegen", "xglm", "biogpt", "ernie4_5", "llama4_text", "exaone4",
        "persimmon",
    )},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "jetmoe": {"kv_channels": 8},
    "deepseek_v3": {"qk_rope_head_dim": 8, "qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "attn_layer_indices": [1],
              "mamba_chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in (
        "bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "mpnet", "big_bird", "convbert",
        "fnet", "squeezebert", "modernbert", "nystromformer", "roformer", "ibert", "yoso", "data2vec-text",
    )},
    "xlnet": {"d_inner": 64},
    "longformer": {"attention_window": [4, 4]},
    "funnel": {"block_sizes": [1, 1], "d_inner": 64, "d_head": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "canine": {"num_hash_buckets": 64},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in (
        "t5", "bart", "mbart", "pegasus", "marian", "longt5", "umt5", "switch_transformers", "prophetnet", "m2m_100",
    )},
    "led": {"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
}  # fmt: skip
_SMALL_STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
PICTURES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("vit", "beit", "dinov2", "data2vec-vision", "vit_msn", "clip", "siglip", "ijepa")},
    "swin": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "convnextv2": _SMALL_STAGES,
    "resnet": {**_SMALL_STAGES, "embedding_size": 8},
    "mobilevit": {"hidden_sizes": [8, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "segformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "pvt_v2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "focal_levels": [1, 1],
                 "focal_windows": [3, 3]},
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "bit": {"hidden_sizes": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "embedding_size": 8, "num_groups": 4},
}  # fmt: skip
