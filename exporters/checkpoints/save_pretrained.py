"""`save_pretrained` of an adapted model: the adapters, and what a training loop needs to go on from.

    folder/<adapter name>/    one adapter folder for each adapter; `load_adapter(base, folder)` opens it
    folder/config.json, ...   what transformers writes beside the weights
    folder/model.safetensors  what was trained, under its state-dict keys: a Trainer resumes from it and loads its best

The base weights are not written. A weights file of another model in the folder is never replaced.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...rewriter.base_names import base_modules
from ...rewriter.errors import CheckpointError, listing
from ...rewriter.modules.save_hook import LOADED, SAVE, is_adapter_key, register_writers
from ...rewriter.modules.shards import full, is_sharded, on_first
from ...rewriter.state import state_of
from ...rewriter.tensors import live_state
from .own_format import save_own

_WEIGHTS = re.compile(r"(model|pytorch_model)\b.*\.(safetensors|bin|index\.json)")
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # what transformers' Trainer calls the folders it writes again


def save_root(root: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of the model that was rewritten; takes what the class's own takes.

    Raises:
        CheckpointError: an adapter cannot be saved, or an argument does not go with adapters.
    """
    given = inspect.signature(own).bind(*args, **kwargs).arguments
    directory = Path(next(iter(given.values())))
    given.update(given.pop("kwargs", {}))
    if not _is_transformers(root):
        written = own(*args, **kwargs)
        _save_adapters(root, directory, {})
        _warn("the class's own files hold the base model", stacklevel=5)
        return written
    if given.get("distributed_checkpoint"):
        raise CheckpointError(
            "save_pretrained(distributed_checkpoint=True) of an adapted model: save its state_dict() with "
            "torch.distributed.checkpoint, or leave the argument out to save the adapters"
        )
    own_state = trained_state(root)
    prefix, values = _without_prefix(given.get("state_dict") or {}, own_state)
    trained = {k: full(values.get(k, t).detach()) for k, t in own_state.items()}  # of shards: every process takes part
    if not given.get("is_main_process", True) and not any(map(is_sharded, own_state.values())):
        return None
    rest = {k: v for k, v in given.items() if k not in ("save_directory", "state_dict", "push_to_hub")}
    foreign = _foreign_weights(directory, trained)

    def write() -> None:
        _save_adapters(root, directory, trained)
        if not foreign:
            state = {prefix + k: t for k, t in trained.items()}
            plain: Any = _without_quantiser(root)
            plain.save_pretrained(directory, state_dict=state, **{**rest, "save_original_format": False})

    on_first(own_state.values(), write)
    if foreign:
        _warn(f"{foreign!r} in that folder is of another model and was left as it is", stacklevel=5)
        return None
    _warn("that folder holds the adapters, not the base model", stacklevel=5)
    if given.get("push_to_hub"):
        taken = ("commit_message", "private", "token", "revision", "create_pr")
        push: Any = root.push_to_hub
        push(given.get("repo_id", directory.name), **{k: given[k] for k in taken if k in given})
    return None


def save_inner(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a module inside an adapted model: its base weights, as its class writes them."""
    given = inspect.signature(own).bind(*args, **kwargs).arguments
    state = given.get("state_dict")
    state = module.state_dict() if state is None else state
    _warn(
        f"this {type(module).__name__} is a part of an adapted model, its base weights were saved and the adapters "
        "were not: they are saved with the whole model",
        stacklevel=5,
    )
    return own(*args, **{**kwargs, "state_dict": {k: t for k, t in state.items() if not is_adapter_key(k)}})


def trained_state(root: nn.Module) -> dict[str, Tensor]:
    """What a training changes, by state-dict key: the adapters with their trained modules, running statistics of
    normalisation layers, and whatever else of the base requires grad."""
    wanted = {id(t) for name in state_of(root).adapters for t in live_state(root, name).values()}
    wanted.update(id(p) for p in root.parameters() if p.requires_grad)
    for _, module in base_modules(root):
        if isinstance(module, _NormBase):
            wanted.update(id(b) for b in module._buffers.values() if b is not None)
    return {key: t for key, t in root.state_dict(keep_vars=True).items() if id(t) in wanted}


def _without_prefix(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """What a wrapper (`torch.compile`, data parallel) puts before the names of a state dict, and the dict without it.
    The wrapper asks for the same names when it resumes."""
    key = next(iter(own), "")
    prefix = next((k.removesuffix(key) for k in values if key and k.endswith(key)), "")
    return prefix, {k.removeprefix(prefix): t for k, t in values.items()}


def _save_adapters(root: nn.Module, directory: Path, values: Mapping[str, Tensor]) -> None:
    """One folder for each adapter, with `values` (by state-dict key) instead of the model's own where given."""
    keys = {id(t): key for key, t in root.state_dict(keep_vars=True).items()} if values else {}
    kept: set[int] = set()
    for name in state_of(root).adapters:
        live = live_state(root, name)
        kept.update(map(id, live.values()))
        given = {n: values[keys[id(t)]] for n, t in live.items() if keys.get(id(t)) in values}
        save_own(root, directory / name, name, given)
    loose = [n for n, p in root.named_parameters() if p.requires_grad and id(p) not in kept]
    if loose:
        _warn(
            f"{listing(loose)} of the base require grad and are in no adapter folder; name their modules in "
            "Spec(train=[...]) to train and save them with the adapter",
            stacklevel=6,
        )


def _foreign_weights(directory: Path, trained: Mapping[str, Tensor]) -> str | None:
    """A weights file there that a save like this one did not write. A Trainer's own checkpoint is written again."""
    if not directory.is_dir() or _CHECKPOINT.fullmatch(directory.name):
        return None
    for file in sorted(directory.iterdir()):
        if _WEIGHTS.fullmatch(file.name) and not _only_trained(file, trained):
            return file.name
    return None


def _only_trained(file: Path, trained: Mapping[str, Tensor]) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return all(key in trained or is_adapter_key(key) for key in opened.keys())  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return False


def _is_transformers(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def _without_quantiser(root: nn.Module) -> nn.Module:
    """The same model to transformers' own method: a quantiser would write the base, or refuse to."""
    view = object.__new__(type(root))  # FSDP2's classes build another model in theirs
    view.__dict__ = {k: v for k, v in root.__dict__.items() if k not in (SAVE, LOADED, "hf_quantizer")}
    return view


def _warn(what: str, stacklevel: int) -> None:
    warnings.warn(
        f"fxgraft, save_pretrained: {what}. fg.load_adapter(base_model, folder) opens the adapters and from_pretrained "
        "does not; fg.merge(adapted).save_pretrained(folder) saves a whole model without adapters",
        stacklevel=stacklevel,
    )


register_writers(save_root, save_inner)
