"""Adapters in the formats of the methods' own authors: HydraLoRA, PRoLoRA, LoRA-SB, LoRA-XS, GLoRA, Uni-LoRA.

Each is known by keys that no other format has. The first three are forks of PEFT and carry its prefix and its config;
the last two write the model's own names. `reader_of` tells them apart, a reader translates or raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.methods.glora import GLoRA
from ..passes.methods.glora_path import CHOICES, GLoRAPath
from ..passes.methods.hydralora import HydraLoRA
from ..passes.methods.lora_xs import LoRAXS
from ..passes.methods.prolora import PRoLoRA
from ..passes.methods.unilora import UniLoRA
from ..rewriter.errors import CheckpointError, listing
from ..rewriter.state import base_modules
from .foreign import Foreign, all_there, by_site, in_model_order, none_left, only_keys, stored_unilora, value
from .peft_load import LORA_FIELDS, lora_at
from .peft_names import check_config, told_names, trained_tensors

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Reader = Callable[[Config, Tensors, nn.Module, str], Foreign]

_FORK = r"base_model\.model\.(?P<site>.+)\."
_LATENT = "default_lora_latent_mapping"


def reader_of(config: Config, tensors: Tensors) -> Reader | None:
    """The reader for a folder of one of these formats, or None."""
    if any(key.endswith(".lora_route.weight") for key in tensors) or config.get("lora_nums") is not None:
        return read_hydralora
    if any(_LATENT in key for key in tensors):
        return read_latent
    if any(".lora_A_vec" in key for key in tensors) or {"reduce_lora_A_x", "unshared_r"} & set(config):
        return read_prolora
    if config.get("method") == "unilora" or "vector_bank" in tensors:
        return read_unilora
    if config.get("method") == "glora":
        return read_glora
    return None


def _check_layers(config: Config, sites: Mapping[str, Any], model: nn.Module, what: str) -> None:
    """Raise if a layer that the config targets has no tensors. Older forks match names more loosely than PEFT does
    now, so a layer with tensors need not be among those we find."""
    if not sites:
        raise CheckpointError(f"{what} has no adapter tensors at all")
    if missing := [name for name in told_names(config, model, what) or () if name not in sites]:
        raise CheckpointError(f"{what} lacks the tensors of {len(missing)} layer(s) it targets: {listing(missing)}")


# -- forks of PEFT -----------------------------------------------------------------------------------------------
def read_hydralora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`lora_route.weight (N, in)`, `lora_A.weight (r, in)`, `lora_B{i}.weight (out, r)` for each expert i.

    The authors draw a dropout mask per expert; that is `HydraLoRA(per_expert_dropout=True)`, off after a load.
    """
    # the balance loss and how the fork merged are matters of training
    known = {"r", "lora_alpha", "lora_dropout", "lora_nums", "blc_alpha", "blc_weight", "merge_weights"}
    check_config(config, known, what)
    experts = value(config, "lora_nums", int, what)
    method = HydraLoRA(
        rank=value(config, "r", int, what),
        experts=experts,
        alpha=value(config, "lora_alpha", float, what),
        dropout=value(config, "lora_dropout", float, what, 0.0),
    )
    names = ["lora_route", "lora_A", *(f"lora_B{i}" for i in range(experts))]
    sites, rest = by_site(tensors, _FORK + rf"(?P<name>{'|'.join(names)})\.weight")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, names, what)
    _check_layers(config, sites, model, what)
    for site, given in sites.items():
        blocks = [given[f"lora_B{i}"] for i in range(experts)]
        if odd := [f"lora_B{i} {tuple(b.shape)}" for i, b in enumerate(blocks) if b.shape != blocks[0].shape]:
            raise CheckpointError(f"{what}: the experts of {site!r} differ in shape: {', '.join(odd)}")
        values |= {f"{site}.A": given["lora_A"], f"{site}.router": given["lora_route"]}
        values[f"{site}.B"] = torch.cat([block.t() for block in blocks])
    return Foreign(dict.fromkeys(in_model_order(sites, model), method), values, train)


def read_latent(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """LoRA-XS and LoRA-SB: PEFT's LoRA plus `default_lora_latent_mapping.weight (r, r)` between A and B.

    Both open as `LoRAXS`, which differs from LoRA-SB in its initialisation only; its alpha says the stored scale.
    """
    check_config(config, LORA_FIELDS, what)
    names = ("lora_A", "lora_B", _LATENT)
    sites, rest = by_site(tensors, _FORK + rf"(?P<name>{'|'.join(names)})\.weight")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, names, what)
    _check_layers(config, sites, model, what)
    methods = {}
    for site in in_model_order(sites, model):
        lora, given = lora_at(config, site, what), sites[site]
        alpha = lora.scale * lora.rank if lora.rslora else lora.alpha
        methods[site] = LoRAXS(rank=lora.rank, alpha=alpha, dropout=lora.dropout)
        values |= {f"{site}.A": given["lora_A"], f"{site}.B": given["lora_B"], f"{site}.R": given[_LATENT]}
    return Foreign(methods, values, train)


def read_prolora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`lora_A.default.weight (q, ceil(in/m))`, `lora_B.default.weight (ceil(out/n), q)` and, where `u > 0`,
    `lora_A_vec.default (u, in)`, `lora_B_vec.default (u, out)`."""
    check_config(config, {"r", "lora_alpha", "lora_dropout", "unshared_r", "reduce_lora_A_x", "reduce_lora_B_x"}, what)
    method = PRoLoRA(
        rank=value(config, "r", int, what),
        unshared=value(config, "unshared_r", int, what),
        a_chunks=value(config, "reduce_lora_A_x", int, what),
        b_chunks=value(config, "reduce_lora_B_x", int, what),
        alpha=value(config, "lora_alpha", float, what),
        dropout=value(config, "lora_dropout", float, what, 0.0),
    )
    ours = {
        "lora_A.default.weight": "A_shared",
        "lora_B.default.weight": "B_shared",
        "lora_A_vec.default": "A_unshared",
        "lora_B_vec.default": "B_unshared",
    }
    absent = {name for name in ours if not (method.unshared if "_vec" in name else method.shared)}
    sites, rest = by_site(tensors, _FORK + rf"(?P<name>{'|'.join(map(re.escape, ours))})")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, [name for name in ours if name not in absent], what)
    _check_layers(config, sites, model, what)
    for site, given in sites.items():
        for name, tensor in given.items():
            if name in absent:  # of rank 0: stored without elements, or not at all
                if tensor.numel():
                    raise CheckpointError(f"{what}: '{site}.{name}' has values, and unshared_r leaves it no rank")
            else:
                values[f"{site}.{ours[name]}"] = tensor.t() if name == "lora_B_vec.default" else tensor
    return Foreign(dict.fromkeys(in_model_order(sites, model), method), values, train)


# -- the model's own names ----------------------------------------------------------------------------------------
def read_unilora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """Uni-LoRA's first code: `vector_bank (d,)` and the indices `<site>.project_params_A (in, r)`,
    `.project_params_B (r, out)`. Norms are counted from these indices over the whole model."""
    only_keys(config, {"method", "rank", "vector_length"}, what)
    method = UniLoRA(rank=value(config, "rank", int, what), vector_length=value(config, "vector_length", int, what))
    rest = dict(tensors)
    theta = rest.pop("vector_bank", None)
    names = ("project_params_A", "project_params_B")
    sites, rest = by_site(rest, r"(?P<site>.+)\.(?P<name>project_params_[AB])")
    none_left(rest, what)
    if theta is None or not sites:
        raise CheckpointError(f"{what} lacks {'vector_bank' if theta is None else 'every project_params tensor'}")
    all_there(sites, names, what)
    for site, given in sites.items():
        if given[names[0]].dim() != 2 or given[names[1]].dim() != 2:
            raise CheckpointError(f"{what}: the indices of {site!r} are not matrices")
    order = in_model_order(sites, model)
    indices = {site: (sites[site][names[0]].t(), sites[site][names[1]].t()) for site in order}
    stored, values = stored_unilora(method, theta, indices, what)
    return Foreign(dict.fromkeys(order, stored), values)


def read_glora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`<site>.Ad, .Au, .Bd, .Bu, .Cd, .Cu, .D, .E` of the supernet, and the path of each site in the config.

    A path takes its part of the supernet's tensors: the first column for `vector`, the first entry for `constant`, the
    first k ranks for `LoRA_k`. Entries that no path reads are not loaded.
    """
    only_keys(config, {"method", "rank", "paths"}, what)
    rank, paths = value(config, "rank", int, what), value(config, "paths", dict, what)
    sites, rest = by_site(tensors, r"(?P<site>.+)\.(?P<name>[ABC][du]|D|E)")
    none_left(rest, what)
    if without := [site for site in paths if site not in sites]:
        raise CheckpointError(f"{what} lacks the tensors of {len(without)} site(s) with a path: {listing(without)}")
    if without := [site for site in sites if site not in paths]:
        raise CheckpointError(f"{what}: the config has no path for {len(without)} site(s): {listing(without)}")
    modules = dict(base_modules(model))
    methods, values = {}, {}
    for site in in_model_order(sites, model):
        path, ranks = _glora_path(paths[site], rank, f"{what}: path of {site!r}")
        most = max(ranks.values(), default=rank)
        methods[site] = GLoRA(rank=most, path=path)
        biased = getattr(modules.get(site), "bias", None) is not None
        for name, (tensor, choice) in _needed(path, biased).items():
            if name not in sites[site]:
                raise CheckpointError(f"{what} lacks 1 tensor(s): {f'{site}.{name}'!r}, which its path needs")
            values[f"{site}.{name}"] = _part(sites[site][name], name, choice, ranks.get(tensor, 1), most)
    return Foreign(methods, values)


def _glora_path(given: Any, rank: int, what: str) -> tuple[GLoRAPath, dict[str, int]]:
    """The path, and the rank of each tensor that is low-rank: the authors write `LoRA_4`."""
    if not isinstance(given, dict) or set(given) != set(CHOICES):
        raise CheckpointError(f"{what}: {given!r} does not say what each of {list(CHOICES)} is")
    ranks, choices = {}, {}
    for tensor, choice in given.items():
        low = re.fullmatch(r"LoRA_(\d+)", choice) if isinstance(choice, str) else None
        if low and "lora" in CHOICES[tensor]:
            if not 1 <= int(low[1]) <= rank:
                raise CheckpointError(f"{what}: {tensor}={choice!r}, and the supernet has rank {rank}")
            ranks[tensor], choice = int(low[1]), "lora"
        elif choice == "lora" or choice not in CHOICES[tensor]:
            allowed = ["LoRA_k" if c == "lora" else c for c in CHOICES[tensor]]
            raise CheckpointError(f"{what}: {tensor}={choice!r}, allowed are {allowed}")
        choices[tensor] = choice
    return GLoRAPath(**choices), ranks


def _needed(path: GLoRAPath, biased: bool) -> dict[str, tuple[str, str]]:
    """Tensor name -> (support tensor, choice) for what a path reads."""
    names: dict[str, tuple[str, str]] = {}
    for tensor in CHOICES:
        choice = getattr(path, tensor)
        stored = (tensor,) if tensor in "DE" else (f"{tensor}d", f"{tensor}u") if choice == "lora" else (f"{tensor}d",)
        if choice != "none" and (tensor != "D" or biased):
            names |= dict.fromkeys(stored, (tensor, choice))
    return names


def _part(tensor: Tensor, name: str, choice: str, rank: int, most: int) -> Tensor:
    """What a choice reads of a supernet tensor, ranks above its own filled up with zeros."""
    if name in ("D", "E"):
        return tensor if choice == "vector" else tensor[:1]
    if tensor.dim() != 2:
        return tensor  # its shape is refused when it meets the model
    if choice != "lora":
        return tensor[:, :1] if choice == "vector" else tensor[:1, :1]
    pad = most - rank
    if name.endswith("d"):
        return torch.cat([tensor[:, :rank], tensor.new_zeros(tensor.shape[0], pad)], 1)
    return torch.cat([tensor[:rank], tensor.new_zeros(pad, tensor.shape[1])])
