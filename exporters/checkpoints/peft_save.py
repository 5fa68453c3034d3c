"""Adapters in HF PEFT's own format, so that PEFT opens them: LoRA, Uni-LoRA and GLoRA (written against PEFT 0.21).

The keys and shapes are those PEFT itself writes. What PEFT cannot hold is refused before anything is written.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...passes.methods.glora.glora import GLoRA
from ...passes.methods.lora import LoRA
from ...passes.methods.unilora.unilora import UniLoRA
from ...passes.models.factors import trained
from ...rewriter.errors import CheckpointError, listing
from ...rewriter.method import Method
from ...rewriter.modules.shards import full, on_first, reshard
from ...rewriter.sites import Site
from ...rewriter.state import AdapterRecord, AdapterTensors, base_modules, grafted_modules, lookup, record_of, unwrap
from ...rewriter.tensors import adapter_modules
from .fill import derived_hash
from .folder import DERIVED, writable, write_folder
from .foreign_adapter import exactly
from .foreign_keys import PREFIX
from .peft_config import is_conv1d, is_linear, saved_names, target_names

Written = tuple[dict[str, Any], dict[str, Tensor]]


def save_peft(
    adapted: nn.Module, directory: str | os.PathLike[str], name: str = "default", save_indices: bool | None = None
) -> Path:
    """Write one adapter so that `peft.PeftModel.from_pretrained` opens it, and return the folder.

    Args:
        save_indices: Uni-LoRA only: store the indices and scales beside the vector. None stores them only where PEFT
            would not derive the same ones from the seed.

    Raises:
        CheckpointError: PEFT cannot hold this adapter; the text says why, and names `to_lora` where that is exact.
    """
    root = unwrap(adapted)
    record = record_of(root, name)
    what = f"adapter {name!r} cannot be saved for PEFT"
    modules = grafted_modules(root)
    _check_sites(record, modules, what)
    kinds = {type(group.method) for group in record.groups}
    writer = _WRITERS.get(next(iter(kinds))) if len(kinds) == 1 else None
    if writer is None:
        raise CheckpointError(f"{what}: {_no_peft_form([group.method for group in record.groups])}")
    if save_indices is not None and kinds != {UniLoRA}:
        raise CheckpointError(f"{what}: save_indices is for Uni-LoRA, and this is {next(iter(kinds)).__name__}")
    reshard(root)
    sites = {t.site.name: t for _, t in adapter_modules(root, name, record) if t.site is not None}
    fields, tensors = writer(root, record, sites, what, save_indices)
    config: dict[str, Any] = {
        "base_model_name_or_path": getattr(getattr(root, "config", None), "name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": _modules_to_save(root, record, what),
        **fields,
    }
    config["target_modules"] = _target_modules(config, root, list(sites), what)
    tensors |= {PREFIX + key: tensor for key, tensor in trained(root, name).items()}
    for tie in record.ties:  # PEFT gives every module a copy of its own: equal values are the tie
        own = modules[tie.path].state_dict()
        tensors |= {f"{PREFIX}{tie.path}.{k}": t for k, t in own.items() if f"{PREFIX}{tie.path}.{k}" not in tensors}
    for tie in record.ties:
        tensors[PREFIX + tie.full] = tensors[f"{PREFIX}{tie.trained}.{tie.name}"]
    live = list(tensors.values())
    tensors = writable({key: full(tensor.detach()) for key, tensor in tensors.items()}, name)
    derived = derived_hash(root, name)
    extra = {DERIVED: derived} if derived is not None else None
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


def _check_sites(record: AdapterRecord, modules: Mapping[str, nn.Module], what: str) -> None:
    if parts := [site.name for site in record.sites if not site.whole]:
        raise CheckpointError(f"{what}: PEFT adapts whole layers, and these are parts of one: {listing(parts)}")
    if hosted := [site.name for site in record.sites if site.host is not None]:
        raise CheckpointError(
            f"{what}: PEFT's layers act when they are called, and the model reads the weights of {listing(hosted)} "
            "without calling them"
        )
    others = [s.name for s in record.sites if not s.owner or s.weight != "weight" or not is_linear(modules[s.owner])]
    if others:
        raise CheckpointError(f"{what}: PEFT adapts nn.Linear and Conv1D inside a model, and not {listing(others)}")


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
    for targets in (names, exactly(names).removeprefix("re:")):
        if set(target_names({**config, "target_modules": targets}, root, what) or ()) == set(names):
            return targets
    raise CheckpointError(f"{what}: PEFT leaves out layers inside modules_to_save={config['modules_to_save']}")


def _common(methods: Mapping[str, Method]) -> Any:
    return Counter(methods.values()).most_common(1)[0][0]


def _one(values: Mapping[str, Any], field: str, what: str) -> Any:
    """The value all sites share."""
    if len(set(values.values())) > 1:
        raise CheckpointError(f"{what}: PEFT has one {field} per adapter, this one has {sorted(set(values.values()))}")
    return next(iter(values.values()))


def _number(given: float) -> float:
    return int(given) if float(given).is_integer() else given


# -- writers: config entries and tensors of one method -------------------------------------------------------------
def _lora(
    root: nn.Module, record: AdapterRecord, sites: Mapping[str, AdapterTensors], what: str, save_indices: bool | None
) -> Written:
    methods = {site.name: group.method for group in record.groups for site in group.sites}
    common = _common(methods)
    ranks, alphas = {}, {}
    for name, method in methods.items():
        assert isinstance(method, LoRA)
        # PEFT has one use_rslora; where a site differs, its alpha makes up for it
        alpha = method.alpha
        if method.rslora != common.rslora:
            alpha = method.scale * (method.rank**0.5 if common.rslora else method.rank)
        if method.rank != common.rank:
            ranks[_anchored(name)] = method.rank
        if alpha != common.alpha:
            alphas[_anchored(name)] = _number(alpha)
    fields = {
        "peft_type": "LORA",
        "r": common.rank,
        "lora_alpha": _number(common.alpha),
        "lora_dropout": _one({n: m.dropout for n, m in methods.items()}, "lora_dropout", what),  # type: ignore[attr-defined]
        "use_rslora": common.rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": _conv1d(root, record.sites),
        "init_lora_weights": True,
    }
    tensors = {}
    for name, module in sites.items():
        for letter in "AB":
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = module.tensors()[letter]
    return fields, tensors


def _anchored(name: str) -> str:
    """A key of PEFT's patterns that matches this name alone: without `^` it would match it as an ending too."""
    return "^" + exactly([name]).removeprefix("re:")


def _conv1d(root: nn.Module, sites: Iterable[Site]) -> bool:
    return any(is_conv1d(lookup(root, site.owner)) for site in sites)


def _unilora(
    root: nn.Module, record: AdapterRecord, sites: Mapping[str, AdapterTensors], what: str, save_indices: bool | None
) -> Written:
    if len(record.groups) > 1:
        raise CheckpointError(
            f"{what}: PEFT has one vector per Uni-LoRA adapter, this one has {len(record.groups)} (overrides). "
            "fg.to_lora(adapted) is the same function as a LoRA: save that, or use format='fxgraft'"
        )
    method = record.groups[0].method
    assert isinstance(method, UniLoRA)
    given_out = [site.name for site in record.sites]
    order = [name for name, _ in base_modules(root) if name in set(given_out)]
    ordered = given_out == order and not isinstance(root, fx.GraphModule)  # a graph may list modules otherwise
    derived = method.sampler == "balanced" and ordered
    if save_indices is False and not derived:
        raise CheckpointError(
            f"{what} without its indices: PEFT would derive others (here sampler={method.sampler!r}); leave "
            "save_indices out, or set it to True"
        )
    saved = not derived if save_indices is None else save_indices
    common = next(iter(sites.values())).shared_tensors()
    fields = {
        "peft_type": "UNILORA",
        "r": method.rank,
        "theta_d_length": method.vector_length,
        "proj_seed": method.seed,
        "unilora_dropout": method.dropout,
        "init_theta_d_bound": method.init_bound,
        "save_indices": saved,
        "fan_in_fan_out": _conv1d(root, record.sites),
    }
    tensors = {"base_model.unilora_theta_d": common["theta"]}
    if saved:
        scales = common["counts"].float().rsqrt()
        for name, module in sites.items():
            given = module.tensors()
            for letter, index in (("A", given["index_a"].long()), ("B", given["index_b"].long().t())):
                tensors[f"{PREFIX}{name}.unilora_indices_{letter}"] = index
                tensors[f"{PREFIX}{name}.unilora_scales_{letter}"] = scales[index]
    return fields, tensors


def _glora(
    root: nn.Module, record: AdapterRecord, sites: Mapping[str, AdapterTensors], what: str, save_indices: bool | None
) -> Written:
    methods = {site.name: group.method for group in record.groups for site in group.sites}
    if any(method.path is None for method in methods.values()):  # type: ignore[attr-defined]
        raise CheckpointError(f"{what}: PEFT has no supernet; fg.fix_paths(adapted, paths) gives every site one path")
    if other := [site.name for site in record.sites if site.form != "linear"]:
        raise CheckpointError(f"{what}: PEFT's GLoRA takes nn.Linear only, and not {listing(other)}")
    paths: dict[bool, dict[str, tuple[str, str, str]]] = {True: {}, False: {}}
    for site in record.sites:
        path, biased = methods[site.name].path, site.bias is not None  # type: ignore[attr-defined]
        D = path.D if biased else "none"  # nothing to scale there
        if path.A != path.B or D != path.E or not (biased or path.C == path.E == "none"):
            raise CheckpointError(
                f"{what}: {site.name!r} has {path}, and PEFT knows one choice for A and B, one for D and E, and "
                "neither C, D nor E where the base has no bias. fg.merge(adapted) folds any path into the model"
            )
        paths[biased][site.name] = (path.A, path.C, path.E)
    everywhere = {n: p[0] for group in paths.values() for n, p in group.items()}
    fields = {
        "peft_type": "GLORA",
        "r": _one({n: m.rank for n, m in methods.items()}, "r", what),  # type: ignore[attr-defined]
        "config_A_B": _one(everywhere, "config_A_B", what),
        "config_C": _one({n: p[1] for n, p in paths[True].items()} or {"": "none"}, "config_C", what),
        "config_D_E": _one({n: p[2] for n, p in paths[True].items()} or {"": "none"}, "config_D_E", what),
    }
    tensors = {}
    for site in record.sites:
        given = sites[site.name].tensors()
        rows, columns = site.out_features, site.in_features
        shapes: dict[str, tuple[int, ...]] = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1)}
        shapes |= {"D": (rows,), "E": (rows,)}
        for letter, shape in shapes.items():
            stem, down, up = f"{PREFIX}{site.name}.glora_{letter}", given.get(f"{letter}d"), given.get(f"{letter}u")
            if letter in given:
                tensors[f"{stem}.X"] = given[letter]
            elif down is None:  # PEFT stores zeros for what is not there, and reports a folder without them
                tensors[f"{stem}.zeros"] = torch.zeros(shape)
            elif up is None:
                tensors[f"{stem}.X"] = down if down.numel() > 1 else down.flatten()
            else:
                tensors[f"{stem}.Xd"], tensors[f"{stem}.Xu"] = down, up
    return fields, tensors


_WRITERS: Mapping[type[Method], Callable[..., Written]] = {LoRA: _lora, UniLoRA: _unilora, GLoRA: _glora}
