"""`save_adapter` and `load_adapter`: one entry for every checkpoint format, told apart by what is in the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from torch import nn

from ...backends.artifact.bounded_files import as_path
from ...rewriter.errors import CheckpointError, SpecError, listing
from ...rewriter.state import M
from .authors import reader_of
from .fill import check_derived
from .folder import DERIVED, WEIGHTS, adapter_folder, check_config_is_theirs, read_folder
from .foreign_adapter import graft
from .foreign_keys import plain_keys
from .native import FORMAT, load_native, save_native
from .peft_config import DESCRIPTIVE
from .peft_load import read_peft
from .peft_save import save_peft

FORMATS = ("fxgraft", "peft")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
        format: `fxgraft` (every method) or `peft` (what HF PEFT can open: LoRA, Uni-LoRA and GLoRA).
        save_indices: for Uni-LoRA in the format `peft`: whether its indices are stored beside the vector. None stores
            them only where PEFT would not derive the same ones from the seed.

    Raises:
        CheckpointError: the folder cannot be written, the values are not finite, or the format cannot hold the method.
    """
    if format not in FORMATS:
        raise CheckpointError(f"save_adapter(format={format!r}): allowed are {FORMATS}")
    if format == "peft":
        return save_peft(adapted, directory, name, save_indices)
    if save_indices is not None:
        raise CheckpointError("save_adapter(save_indices=...) is for format='peft'; fxgraft's own always fits")
    return save_native(adapted, directory, name)


def load_adapter(model: M, directory: str | os.PathLike[str], name: str = "default") -> M:
    """Graft a saved adapter and return the adapted model; the input model is not changed.

    Opens fxgraft's own folders, HF PEFT's (LoRA, Uni-LoRA, GLoRA), and those of the authors' code of HydraLoRA,
    PRoLoRA, LoRA-XS, LoRA-SB, GLoRA and Uni-LoRA, told apart by their keys. Every tensor and every config entry is
    used or refused; one is ignored only where it cannot change what the model computes. Of a folder with an adapter in
    each of its folders (`save_pretrained`, a Trainer's checkpoint) it opens the only one, or the one called `name`.

    Raises:
        CheckpointError: the folder is not an adapter, is damaged, says something that is not supported, or does not
            fit this model.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"load_adapter({type(model).__name__}, ...): give an nn.Module or an fx.GraphModule; of an ExportedProgram "
            "that is program.module()"
        )
    folder = adapter_folder(as_path(directory), name)
    stored = read_folder(folder)
    config, tensors, what = stored.config, stored.tensors, f"the adapter in {str(folder)!r}"
    if not stored.weights:
        _refuse_pickle(folder)
    if config.get("format") == FORMAT:
        return load_native(model, stored, name, what)
    if not stored.weights and ("method" in config or "peft_type" in config):
        raise CheckpointError(f"{what}: {WEIGHTS} is missing")
    if "peft_type" in config:
        tensors = plain_keys(tensors, what)
    reader = reader_of(config, tensors) or (read_peft if "peft_type" in config else None)
    if reader is None:
        raise CheckpointError(
            f"{str(folder)!r}: the format of this adapter is not known (keys of its config: "
            f"{listing(sorted(config), 12)}; of its tensors: {listing(sorted(tensors))})"
        )
    check_config_is_theirs(stored, DESCRIPTIVE, what)
    try:
        foreign = reader(config, tensors, model, what)
    except SpecError as error:  # a value in the config that the method does not allow
        raise CheckpointError(f"{what}: {error}") from error
    adapted = graft(model, foreign, name, what)
    check_derived(adapted, name, stored.metadata.get(DERIVED), what)
    return adapted


def _refuse_pickle(directory: Path) -> None:
    """A pickle runs code when it is read, so it is not read at all."""
    if found := sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES):
        raise CheckpointError(
            f"{str(directory / found[0])!r} is a pickle, which can run any code when it is opened, and {WEIGHTS} is "
            "missing. Convert it where you trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), "
            f"{WEIGHTS!r})"
        )
