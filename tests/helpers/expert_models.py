"""Tiny models whose experts are stacked in 3-d parameters, in the layouts that transformers has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def mixtral(**changes: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    moe = {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**(SIZES | moe | changes)))


def gpt_oss() -> Any:
    """Transposed weights, with a bias for every expert."""
    from transformers import GptOssConfig, GptOssForCausalLM

    moe = {
        "intermediate_size": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
    }
    return GptOssForCausalLM(GptOssConfig(**SIZES, **moe))


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    moe = {
        "intermediate_size": 20,
        "moe_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe))


def llama4() -> Any:
    """Transposed weights, every expert over every token, and no other implementation."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    moe = {
        "intermediate_size": 20,
        "intermediate_size_mlp": 28,
        "num_local_experts": 4,
        "head_dim": 8,
        "attention_chunk_size": 16,
    }
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **moe, interleave_moe_layer_step=1))


def jetmoe() -> Any:
    """A module per weight, which is called `weight`; attention has experts too."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    sizes = {k: v for k, v in SIZES.items() if k not in ("num_attention_heads", "max_position_embeddings")}
    moe = {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    return JetMoeForCausalLM(JetMoeConfig(**sizes, **moe))


#: the models whose experts run in any of transformers' implementations
SWITCHED: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe}
EXPERTS = SWITCHED | {"llama4": llama4, "jetmoe": jetmoe}


def made(build: Callable[[], Any], seed: int = 0) -> Any:
    """The model in eval mode, its parameters drawn anew: some are made empty or zero."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(1))
