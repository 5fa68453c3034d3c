"""What the examples of this folder train: a small language model, and rows that repeat a pattern of four tokens.

After the first four tokens the next one can be known, so the loss falls from log(64) towards that of guessing four.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxgraft as fg

VOCABULARY = 64
SPEC = fg.Spec(fg.UniLoRA(rank=8, vector_length=2048), targets=["q_proj", "v_proj", "up_proj"], train=["lm_head"])


def base() -> nn.Module:
    """The model as it comes: random weights here, `from_pretrained` in earnest. The same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """`count` rows of 16 tokens, input and labels alike."""
    rng = random.Random(seed)
    patterns = [[rng.randrange(3, VOCABULARY) for _ in range(4)] for _ in range(count)]
    return [{"input_ids": pattern * 4, "labels": pattern * 4} for pattern in patterns]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows -> `(batch, 16)` tensors."""
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """On rows that no example trains on."""
    return model.eval()(**collate(rows(32, seed=1))).loss.item()


def groups(adapted: nn.Module) -> list[dict]:
    """Uni-LoRA's vector takes a large step and no decay."""
    return fg.parameter_groups(adapted, lr=1e-3, weight_decay=0.01, vector_lr=3e-2, head_lr=3e-3)


def run(main: Callable[[Path], tuple[float, float]]) -> None:
    """`python example.py [folder]`: the loss after training, and that of what was saved, opened on a new base."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else f"{Path(sys.argv[0]).stem}_run")
    trained, loaded = main(folder)
    print(f"trained {trained:.4f}, loaded {loaded:.4f}")
