"""`save_adapter` and `load_adapter`: one entry for every checkpoint format, told apart by what is in the folder."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..rewriter.errors import CheckpointError
from .native import FORMAT, load_native, read_config, save_native

FORMATS = ("fxgraft", "peft")


def save_adapter(
    adapted: nn.Module, directory: str | os.PathLike[str], name: str = "default", format: str = "fxgraft"
) -> Path:
    """Save one adapter as `adapter_config.json` + `adapter_model.safetensors` and return the folder.

    Only what was trained or cannot be derived is written: a Uni-LoRA adapter is its vector and the trained head.

    Args:
        directory: made if needed; an adapter already there is replaced once the new one is complete.
        format: `fxgraft` (every method) or `peft` (what HF PEFT can open).

    Raises:
        CheckpointError: the folder cannot be written, the values are not finite, or the format cannot hold the method.
    """
    if format == "fxgraft":
        return save_native(adapted, directory, name)
    raise CheckpointError(f"save_adapter(format={format!r}): allowed are {FORMATS}")


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Graft a saved adapter and return the adapted model; the input model is not changed.

    Raises:
        CheckpointError: the folder is not an adapter, is damaged, or does not fit this model.
    """
    config = read_config(directory)
    if config.get("format") == FORMAT:
        return load_native(model, directory, name)
    raise CheckpointError(
        f"{str(directory)!r}: the format of this adapter is not known (keys of its config: {sorted(config)[:12]})"
    )
