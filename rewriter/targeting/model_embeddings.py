"""What a model says of its own embeddings and heads, where it has a method for that."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn


def told_embeddings(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """`get_input_embeddings()` or `get_output_embeddings()` of transformers; None where there is none."""
    given = told(model, f"get_{which}_embeddings")
    return given if isinstance(given, nn.Module) else None


def told(model: nn.Module, method: str) -> Any:
    """What a method without arguments gives; None for a model that has no such method, or raises as it does not know
    (transformers), or wants to be asked otherwise."""
    ask = getattr(model, method, None)
    try:
        return ask() if callable(ask) else None
    except (NotImplementedError, AttributeError, TypeError):
        return None
