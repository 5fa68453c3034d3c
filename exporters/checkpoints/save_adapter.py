"""`fg.save_adapter`: one adapter into a folder, in fxgraft's own format or, so that PEFT opens it, in HF PEFT's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ...passes.methods.lora import LoRA
from ...passes.models.factors import trained
from ...rewriter.base_names import base_parameters, lookup
from ...rewriter.errors import CheckpointError, listing
from ...rewriter.method import Method
from ...rewriter.modules.shards import full, on_first, reshard
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.program_verbs import over_programs
from ...rewriter.sites import Site
from ...rewriter.state import AdapterRecord, grafted_modules, record_of
from ...rewriter.targeting.patterns import inside
from ...rewriter.tensors import adapter_modules
from .derived_hash import IN_METADATA, derived_hash
from .folder_files import writable, write_folder
from .foreign.format import OwnAdapter
from .foreign.peft_attention import OUTPUT, PACKED, adapted_attentions, stored_name, targets_of
from .foreign.peft_convolutions import is_convolution
from .foreign.peft_folder import BIASES
from .foreign.peft_targets import is_embedding, is_linear, saved_names, target_names
from .foreign.plain_keys import PREFIX
from .formats import FORMATS
from .own_format import save_own


@over_programs
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
    if format not in ("fxgraft", "peft"):
        raise CheckpointError(f"save_adapter(format={format!r}): allowed are {('fxgraft', 'peft')}")
    if format == "peft":
        return _save_peft(adapted, directory, name, save_indices)
    if save_indices is not None:
        raise CheckpointError("save_adapter(save_indices=...) is for format='peft'; fxgraft's own always fits")
    return save_own(adapted, directory, name)


def _save_peft(adapted: nn.Module, directory: str | os.PathLike[str], name: str, save_indices: bool | None) -> Path:
    """Write what PEFT 0.21 itself would write; what it cannot hold is refused before anything is written."""
    root = unwrap(adapted)
    record = record_of(root, name)
    what = f"adapter {name!r} cannot be saved for PEFT"
    modules = grafted_modules(root)
    parameters = _check_sites(record, modules, what)
    kinds = {type(group.method) for group in record.groups}
    writer = next((format for format in FORMATS if format.write and kinds == {format.method}), None)
    if writer is None or writer.write is None:
        raise CheckpointError(f"{what}: {_no_peft_form([group.method for group in record.groups])}")
    if save_indices is not None and not writer.has_indices:
        taking = " and ".join(format.method.__name__ for format in FORMATS if format.has_indices and format.method)
        raise CheckpointError(f"{what}: save_indices is for {taking}, and this is {next(iter(kinds)).__name__}")
    reshard(root)
    sites = {t.site.name: t for _, t in adapter_modules(root, name, record) if t.site is not None}
    mine = OwnAdapter(root, record, sites, what, save_indices, parameters)
    fields, tensors = writer.write(mine)
    config: dict[str, Any] = {
        "base_model_name_or_path": getattr(getattr(root, "config", None), "name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
        "bias": _bias(root, record, what),
        "modules_to_save": _modules_to_save(root, record, what),
        **fields,
    }
    if (bias := config["bias"]) != "none":
        known = BIASES.get(str(config["peft_type"]), ())
        config["bias"] = next((name for name in known if name == bias or name.endswith(bias)), None)
        if config["bias"] is None:
            raise CheckpointError(f"{what}: it trains biases, which fit PEFT's LoRA and VeRA folders only")
    layers = targets_of([name for name in sites if name not in parameters], mine.attentions)
    config["target_modules"] = _target_modules(config, root, layers, what)
    under = {f"{site.owner}.{site.bias}" for site in record.sites if site.bias is not None}
    for key, tensor in trained(root, name).items():  # PEFT keeps the base's tensors of an adapted layer one level down
        below = key in record.parameters and key in under
        place = f"{stored_name(key.removesuffix('.bias'), mine.attentions)}.base_layer.bias" if below else key
        tensors[PREFIX + place] = tensor
    for tie in record.ties:  # PEFT gives every module a copy of its own: equal values are the tie
        own = modules[tie.path].state_dict()
        tensors |= {f"{PREFIX}{tie.path}.{k}": t for k, t in own.items() if f"{PREFIX}{tie.path}.{k}" not in tensors}
    for tie in record.ties:
        tensors[PREFIX + tie.full] = tensors[f"{PREFIX}{tie.trained}.{tie.name}"]
    live = list(tensors.values())
    tensors = writable({key: full(tensor.detach()) for key, tensor in tensors.items()}, name)
    derived = derived_hash(root, name)
    extra = {IN_METADATA: derived} if derived is not None else None
    on_first(live, lambda: write_folder(directory, config, tensors, extra))
    return Path(directory)


# -- what PEFT can hold ------------------------------------------------------------------------------------------
def _no_peft_form(methods: Iterable[Method]) -> str:
    methods = list(methods)
    names = sorted({type(m).__name__ for m in methods})
    said = f"PEFT has no {names[0]}" if len(names) == 1 else f"a PEFT adapter has one method, this one has {names}"
    reasons = [m.not_low_rank for m in methods if m.not_low_rank]
    if reasons:
        return f"{said}, and it is not a LoRA: {reasons[0]}. Save it with format='fxgraft'"
    return f"{said}. fg.to_lora(adapted) is the same function as a LoRA: save that, or use format='fxgraft'"


def _check_sites(record: AdapterRecord, modules: Mapping[str, nn.Module], what: str) -> tuple[str, ...]:
    """Raise where PEFT cannot adapt a site; the sites that are no layers of its, but parameters."""
    if parts := [site.name for site in record.sites if not site.whole]:
        raise CheckpointError(f"{what}: PEFT adapts whole layers, and these are parts of one: {listing(parts)}")
    lora = all(isinstance(group.method, LoRA) for group in record.groups)
    attentions = adapted_attentions(record, modules, what) if lora else []
    whole = {f"{path}.{last}" for path in attentions for last in (PACKED, OUTPUT)}
    if hosted := [site.name for site in record.sites if site.host is not None and site.name not in whole]:
        raise CheckpointError(
            f"{what}: PEFT's layers act when they are called, and the model reads the weights of {listing(hosted)} "
            "without calling them"
        )
    given = [s for s in record.sites if s.name not in whole]
    others = [s for s in given if not s.owner or s.weight != "weight" or not _wrapped(s, modules)]
    plain = [s for s in others if s.owner and (s.experts or (s.product.plain and s.product.linear))]
    if len(plain) == len(others) and lora:
        return tuple(s.name for s in plain)
    if others:
        raise CheckpointError(
            f"{what}: PEFT adapts nn.Linear and Conv1D inside a model, with LoRA nn.Embedding and nn.Conv1d to 3d too, "
            f"and not {listing(s.name for s in others)}"
        )
    return ()


def _wrapped(site: Site, modules: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT would wrap the layer of a site."""
    if site.form == "convolution":
        return is_convolution(modules[site.owner])
    return is_embedding(modules[site.owner]) if site.form == "embedding" else is_linear(modules[site.owner])


def _bias(root: nn.Module, record: AdapterRecord, what: str) -> str:
    """Which biases are trained with an adapter, as PEFT calls it: `none`, `all`, or `_only` those of its layers."""
    given = set(record.parameters)
    if not given:
        return "none"
    every = {n for n, _ in base_parameters(root) if n.endswith(".bias") and not inside(n, record.train)}
    sites = {f"{site.owner}.{site.bias}" for site in record.sites if site.bias is not None}
    if given == every:
        return "all"
    if given == sites:
        return "_only"
    other = sorted(given - every) or sorted(every - given)
    raise CheckpointError(
        f"{what}: PEFT trains all biases of a model or those of its adapted layers, and no other parameters by "
        f"themselves; the difference is {listing(other)}. Save it with format='fxgraft'"
    )


def _modules_to_save(root: nn.Module, record: AdapterRecord, what: str) -> list[str] | None:
    train = [*record.train, *dict.fromkeys(tie.path for tie in record.ties)]
    for path in train:
        module = lookup(root, path)
        if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            raise CheckpointError(f"{what}: PEFT trains modules that it can call, and {path!r} is a list of parameters")
        if path not in record.train and any(True for _ in module.children()):
            raise CheckpointError(
                f"{what}: {path!r} is tied to a module that it trains, and PEFT would train all that is inside it. "
                "Save it with format='fxgraft', or train with Spec(keep_ties=False)"
            )
    if train and (also := [name for name in saved_names(train, root) if name not in train]):
        raise CheckpointError(f"{what}: PEFT takes any name ending, and {train} would also train {listing(also)}")
    return train or None


def _target_modules(config: Mapping[str, Any], root: nn.Module, names: list[str], what: str) -> list[str] | str:
    """The sites' full names; as a regular expression where one of them is also the ending of another layer's name."""
    if not names:
        return []
    for targets in (names, "|".join(map(re.escape, names))):
        if set(target_names({**config, "target_modules": targets}, root, what) or ()) == set(names):
            return targets
    raise CheckpointError(f"{what}: PEFT leaves out layers inside modules_to_save={config['modules_to_save']}")
