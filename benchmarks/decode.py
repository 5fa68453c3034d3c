"""One decoding step of a Llama of SmolLM2-135M's shape: one token, a static key-value cache, compiled.

The weights are random (the time does not depend on them), so nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness
import subjects
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxgraft as fg

PAST = 128
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def smollm2(quick: bool) -> LlamaForCausalLM:
    """SmolLM2-135M's structure (its published config.json)."""
    config = LlamaConfig(
        vocab_size=1000 if quick else 49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def measure(report: harness.Report, *, quick: bool) -> None:
    base = smollm2(quick)
    models = {
        "compiled base": torch.compile(base),
        "fxgraft LoRA r8": fg.compile(subjects.rewritten(base, fg.LoRA(rank=8, alpha=16), TARGETS)),
        "fxgraft Uni-LoRA": fg.compile(
            subjects.rewritten(base, fg.UniLoRA(rank=4, vector_length=subjects.UNILORA_LENGTH), TARGETS)
        ),
        "fxgraft LoRA, merged": torch.compile(fg.merge(subjects.rewritten(base, fg.LoRA(rank=8, alpha=16), TARGETS))),
    }
    torch._dynamo.reset()
    token, position = torch.tensor([[7]]), torch.tensor([[PAST]])
    candidates = []
    for name, model in models.items():
        cache = StaticCache(config=copy.deepcopy(base.config), max_cache_len=PAST + 64)
        with torch.no_grad():
            base(torch.randint(3, 900, (1, PAST)), past_key_values=cache, use_cache=True)

        def call(model: Callable[..., Any] = model, cache: StaticCache = cache) -> Tensor:
            with torch.no_grad():
                return model(token, position_ids=position, past_key_values=cache, use_cache=True).logits

        def rewind(cache: StaticCache = cache) -> None:
            """The same step again: the cache counts its own length."""
            for layer in cache.layers:
                layer.cumulative_length.fill_(PAST)

        candidates.append(harness.Candidate(name, call, prepare=rewind))
    title = f"Decoding step: Llama of SmolLM2-135M's shape, all linears, 1 token after {PAST}"
    report.add(harness.measure(title, candidates, "compiled base", rounds=report.options["rounds"]))
