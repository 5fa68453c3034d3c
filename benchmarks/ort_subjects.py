"""What the scripts of ONNX Runtime share: a small encoder, adapters with an effect, token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel

import fxgraft as fg

RANK = 8


def minilm() -> nn.Module:
    """MiniLM-L6's structure with a small vocabulary."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=1000
    )
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False).eval()


def stirred(base: nn.Module, method: Any, targets: tuple[str, ...], seed: int = 0) -> nn.Module:
    """An adapter with an effect: exporting one without would prove nothing."""
    adapted = fg.rewrite(base, fg.Spec(method, targets=list(targets)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 1e-2)
    return adapted.eval()


def ids(batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(seed).integers(3, 900, (batch, tokens))}
