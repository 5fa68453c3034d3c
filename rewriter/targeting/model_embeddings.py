"""What a model of transformers says its embeddings are."""

from __future__ import annotations

from typing import Literal

from torch import nn


def told_embeddings(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """`get_input_embeddings()` or `get_output_embeddings()`; None for a model that has no such method or nothing to
    say: transformers raises where it does not know."""
    ask = getattr(model, f"get_{which}_embeddings", None)
    if not callable(ask):
        return None
    try:
        told = ask()
    except (NotImplementedError, AttributeError):
        return None
    return told if isinstance(told, nn.Module) else None
