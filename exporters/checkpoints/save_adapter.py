"""`fg.save_adapter`: one adapter into a folder, in fxgraft's own format or in HF PEFT's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from torch import nn

from ...rewriter.errors import CheckpointError
from .own_format import save_own
from .save_peft import save_peft

FORMATS = ("fxgraft", "peft")


def save_adapter(
    adapted: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    format: Literal["fxgraft", "peft"] = "fxgraft",
    *,
    save_indices: bool | None = None,
) -> Path:
    """Save one adapter as `adapter_config.json` + `adapter_model.safetensors` and return the folder.

    Only what was trained or cannot be derived is written: a Uni-LoRA adapter is its vector and the trained head.

    Args:
        directory: made if needed; an adapter already there is replaced once the new one is complete.
        format: `fxgraft` (every method) or `peft` (what HF PEFT can open: LoRA, Uni-LoRA, VeRA, GLoRA).
        save_indices: in the format `peft`: whether what follows from a seed is stored too, Uni-LoRA's indices, VeRA's A
            and B. None stores them only where PEFT would not derive the same ones.

    Raises:
        CheckpointError: the folder cannot be written, the values are not finite, or the format cannot hold the method.
    """
    if format not in FORMATS:
        raise CheckpointError(f"save_adapter(format={format!r}): allowed are {FORMATS}")
    if format == "peft":
        return save_peft(adapted, directory, name, save_indices)
    if save_indices is not None:
        raise CheckpointError("save_adapter(save_indices=...) is for format='peft'; fxgraft's own always fits")
    return save_own(adapted, directory, name)
