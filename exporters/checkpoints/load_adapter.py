"""`fg.load_adapter`: a saved adapter onto a model, of every format, told apart by what is in the folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import nn

from ...passes.models.bank_sources import register_folder_opener
from ...rewriter.errors import CheckpointError, SpecError, listing
from ...rewriter.modules.wrappers import M
from ...rewriter.program_verbs import opening_on_programs
from .derived_hash import check_derived
from .folder_files import WEIGHTS, check_config_is_theirs, read_folder
from .foreign.foreign_folder import ForeignFolder
from .foreign.peft_folder import DESCRIPTIVE
from .foreign.plain_keys import plain_keys
from .formats import FORMATS
from .graft_foreign import graft_foreign
from .own_format import is_own, load_own

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@opening_on_programs
def load_adapter(model: M, directory: str | os.PathLike[str], name: str = "default") -> M:
    """Graft a saved adapter and return the adapted model; the input model is not changed.

    Opens fxgraft's own folders, HF PEFT's (LoRA, Uni-LoRA, VeRA, GLoRA), and those of the authors' code of HydraLoRA,
    PRoLoRA, LoRA-XS, LoRA-SB, GLoRA and Uni-LoRA, told apart by their keys. Every tensor and every config entry is
    used or refused; one is ignored only where it cannot change what the model computes. Of a folder with an adapter in
    each of its folders (`save_pretrained`, a Trainer's checkpoint) it opens the only one, or the one called `name`.
    A plain `ExportedProgram` gets the adapter as it is served, without dropout.

    Raises:
        CheckpointError: the folder is not an adapter, is damaged, says something that is not supported, or does not
            fit this model.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"load_adapter({type(model).__name__}, ...): give an nn.Module, an fx.GraphModule or an ExportedProgram"
        )
    stored = read_folder(directory, name)
    config, tensors, what = stored.config, stored.tensors, stored.what
    if not stored.weights:
        _refuse_pickle(stored.folder)
    if is_own(stored):
        return load_own(model, stored, name)
    if not stored.weights and ("method" in config or "peft_type" in config):
        raise CheckpointError(f"{what}: {WEIGHTS} is missing")
    if "peft_type" in config:
        tensors = plain_keys(tensors, FORMATS, what)
    format = next((format for format in FORMATS if format.knows(config, tensors)), None)
    if format is None and "peft_type" in config:
        raise CheckpointError(
            f"{what}: peft_type={config['peft_type']!r} is not supported; PEFT methods that open here are "
            f"{[format.peft_type for format in FORMATS if format.peft_type]}"
        )
    if format is None:
        raise CheckpointError(
            f"{str(stored.folder)!r}: the format of this adapter is not known (keys of its config: "
            f"{listing(sorted(config), 12)}; of its tensors: {listing(sorted(tensors))})"
        )
    check_config_is_theirs(stored, DESCRIPTIVE)
    try:
        foreign = format.read(ForeignFolder(config, tensors, model, what))
    except SpecError as error:  # a value in the config that the method does not allow
        raise CheckpointError(f"{what}: {error}") from error
    if foreign.warning:
        warnings.warn(f"{what}: {foreign.warning}", stacklevel=2)
    adapted = graft_foreign(model, foreign, name, what)
    check_derived(adapted, name, stored)
    return adapted


def _refuse_pickle(directory: Path) -> None:
    """A pickle runs code when it is read, so it is not read at all."""
    if found := sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES):
        raise CheckpointError(
            f"{str(directory / found[0])!r} is a pickle, which can run any code when it is opened, and {WEIGHTS} is "
            "missing. Convert it where you trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), "
            f"{WEIGHTS!r})"
        )


register_folder_opener(load_adapter)
