"""HF PEFT folders in: LoRA, Uni-LoRA and GLoRA (written against PEFT 0.21).

Sites come from the tensors' own keys, not from the config's patterns; where both are there they have to agree. Only
Uni-LoRA without stored indices leaves nothing but patterns, and then the projection is handed out in model order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...passes.methods.glora.glora import GLoRA
from ...passes.methods.glora.path import GLoRAPath
from ...passes.methods.lora import LoRA
from ...passes.methods.unilora.unilora import UniLoRA, balanced_indices
from ...rewriter.errors import CheckpointError, listing
from ...rewriter.state import base_modules, unwrap
from .foreign_adapter import Foreign, all_there, by_site, in_model_order, stored_unilora, used_counts, value
from .peft_config import attention_outputs, check_config, pattern_value, told_names, trained_tensors

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

LORA_FIELDS = frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"})


def read_peft(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """Any PEFT adapter that is not of a fork.

    Raises:
        CheckpointError: another method, an option that is not supported, or tensors that are missing or unknown.
    """
    reader = _READERS.get(str(config.get("peft_type")))
    if reader is None:
        raise CheckpointError(
            f"{what}: peft_type={config.get('peft_type')!r} is not supported; PEFT methods that open here are "
            f"{list(_READERS)}"
        )
    return reader(config, tensors, model, what)


def read_lora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`<site>.lora_A.weight (r, in)`, `<site>.lora_B.weight (out, r)`."""
    check_config(config, LORA_FIELDS, what)
    sites, rest = by_site(tensors, r"base_model\.model\.(?P<site>.+)\.(?P<name>lora_[AB])\.weight")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, ("lora_A", "lora_B"), what)
    same_sites(config, sites, model, what)
    if inert := [site for site in sites if site in attention_outputs(model)]:
        if len(inert) == len(sites):
            raise CheckpointError(f"{what} does nothing: nn.MultiheadAttention never calls {listing(inert)}")
        warnings.warn(
            f"{what}: nn.MultiheadAttention never calls {listing(inert)}: in PEFT these factors do nothing, and they "
            "are left out here",
            stacklevel=4,
        )
        sites = {site: given for site, given in sites.items() if site not in inert}
    methods = {site: lora_at(config, site, what) for site in in_model_order(sites, model)}
    for site, given in sites.items():
        values |= {f"{site}.A": given["lora_A"], f"{site}.B": given["lora_B"]}
    return Foreign(methods, values, train)


def lora_at(config: Config, site: str, what: str) -> LoRA:
    """The LoRA a config describes at one site, `rank_pattern` and `alpha_pattern` applied as PEFT does."""
    rank = value(config, "r", int, what, 8)
    alpha = value(config, "lora_alpha", float, what, 8)
    return LoRA(
        rank=pattern_value(value(config, "rank_pattern", dict, what, {}), site, rank, what),
        alpha=pattern_value(value(config, "alpha_pattern", dict, what, {}), site, alpha, what),
        dropout=value(config, "lora_dropout", float, what, 0.0),
        rslora=value(config, "use_rslora", bool, what, False),
    )


def same_sites(config: Config, sites: Mapping[str, Any], model: nn.Module, what: str, *, loosely: bool = False) -> None:
    """Raise if the config's patterns and the tensors name different layers: one of them is not the adapter's.

    Args:
        loosely: for the forks, whose older PEFT matched names more loosely: a layer with tensors may also end in a
            target as a text, or be one that an expression does not match.
    """
    if not sites:
        raise CheckpointError(f"{what} has no adapter tensors at all")
    named = told_names(config, model, what)
    if named is None:
        return
    if missing := [name for name in named if name not in sites]:
        raise CheckpointError(f"{what} lacks the tensors of {len(missing)} layer(s) it targets: {listing(missing)}")
    targets = config["target_modules"]
    endings: tuple[str, ...] = ()  # nothing ends in one of none
    where = f" in this {type(model).__name__}"
    if loosely:
        endings, where = tuple(targets) if isinstance(targets, (list, tuple)) else ("",), ""
    if other := [name for name in sites if name not in named and not name.endswith(endings)]:
        raise CheckpointError(
            f"{what} has tensors for {len(other)} layer(s) that its target_modules={targets!r} do not name{where}: "
            f"{listing(other)}"
        )


def _unilora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    check_config(
        config, {"r", "theta_d_length", "proj_seed", "unilora_dropout", "init_theta_d_bound", "save_indices"}, what
    )
    method = UniLoRA(
        rank=value(config, "r", int, what, 4),
        vector_length=value(config, "theta_d_length", int, what, 256),
        seed=value(config, "proj_seed", int, what, 42),
        dropout=value(config, "unilora_dropout", float, what, 0.0),
        init_bound=value(config, "init_theta_d_bound", float, what, 0.02),
    )
    rest = dict(tensors)
    theta = rest.pop("base_model.unilora_theta_d", None)
    if theta is None:
        raise CheckpointError(f"{what} lacks 1 tensor(s): 'base_model.unilora_theta_d'")
    sites, rest = by_site(rest, r"base_model\.model\.(?P<site>.+)\.unilora_(?P<name>(indices|scales)_[AB])")
    train, values = trained_tensors(config, model, rest, what)
    if not sites:
        if config.get("save_indices"):
            raise CheckpointError(f"{what} was saved with save_indices, and lacks every unilora_indices tensor")
        names = told_names(config, model, what)
        if isinstance(unwrap(model), fx.GraphModule):
            raise CheckpointError(
                f"{what} stores no indices; they count in the order of the model's modules, which a graph may have "
                "lost. Open it on the model itself"
            )
        if not names:
            raise CheckpointError(
                f"{what} stores no indices, so its target_modules have to say where it goes, and "
                f"{config.get('target_modules')!r} names no linear layer of this {type(model).__name__}"
            )
        return Foreign(dict.fromkeys(names, method), {**values, "theta": theta}, train)
    all_there(sites, ("indices_A", "indices_B", "scales_A", "scales_B"), what)
    same_sites(config, sites, model, what)
    order = in_model_order(sites, model)
    indices = {name: (sites[name]["indices_A"], sites[name]["indices_B"]) for name in order}
    stored, given = stored_unilora(method, theta, indices, what)
    _check_scales(sites, method.vector_length, what)
    flat = np.concatenate([index.flatten().numpy() for pair in indices.values() for index in pair])
    if np.array_equal(flat, balanced_indices(flat.size, method.vector_length, method.seed)):
        return Foreign(dict.fromkeys(order, method), {**values, "theta": theta}, train)
    return Foreign(dict.fromkeys(order, stored), {**values, **given}, train)


def _check_scales(sites: Mapping[str, Tensors], length: int, what: str) -> None:
    """Uni-LoRA's scales are `1 / sqrt(n)`; a base in half precision rounds the stored ones."""
    scales = used_counts([t[f"indices_{x}"] for t in sites.values() for x in "AB"], length).double().rsqrt()
    for name, given in sites.items():
        for letter in "AB":
            here = given[f"scales_{letter}"]
            expected = scales[given[f"indices_{letter}"].long()]
            near = 4 * torch.finfo(here.dtype).eps if here.is_floating_point() else 0.0
            if here.shape != expected.shape or not torch.allclose(here.double(), expected, rtol=near, atol=0):
                raise CheckpointError(
                    f"{what}: the scales of {name!r} ({letter}) are not 1 / sqrt(how often each entry is used); this "
                    "is not a Uni-LoRA projection, or its base was quantised when it was saved"
                )


def _glora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    check_config(config, {"r", "config_A_B", "config_C", "config_D_E"}, what)
    rank = value(config, "r", int, what, 8)
    both, C = value(config, "config_A_B", str, what, "lora"), value(config, "config_C", str, what, "lora")
    line = value(config, "config_D_E", str, what, "constant")
    path = GLoRAPath(A=both, B=both, C=C, D=line, E=line)
    sites, rest = by_site(tensors, r"base_model\.model\.(?P<site>.+)\.glora_(?P<name>[A-E]\.(Xd|Xu|X|zeros))")
    train, values = trained_tensors(config, model, rest, what)
    modules = dict(base_modules(model))
    methods = {}
    for site in in_model_order(sites, model):
        given = dict(sites[site])
        # PEFT leaves C, D and E out where the base has no bias, whatever the config says
        biased = getattr(modules.get(site), "bias", None) is not None
        here = path if biased else replace(path, C="none", D="none", E="none")
        methods[site] = GLoRA(rank=rank, path=here)
        for letter in "ABCDE":
            kind = getattr(here, letter)
            zeros = given.pop(f"{letter}.zeros", None) if kind == "none" else None
            if zeros is not None and zeros.any():
                raise CheckpointError(f"{what}: {site}.glora_{letter}.zeros is not zero")
            for ours, theirs in _glora_names(letter, kind).items():
                if theirs not in given:
                    raise CheckpointError(f"{what} lacks 1 tensor(s): '{site}.glora_{theirs}'")
                tensor = given.pop(theirs)
                scalar = kind == "constant" and letter in "AB"
                values[f"{site}.{ours}"] = tensor.reshape(1, 1) if scalar and tensor.numel() == 1 else tensor
        if given:
            raise CheckpointError(
                f"{what}: {site!r} has {here} here and also has tensors that are not understood: "
                f"{listing(f'glora_{name}' for name in given)}"
            )
    same_sites(config, sites, model, what)
    return Foreign(methods, values, train)


def _glora_names(letter: str, kind: str) -> dict[str, str]:
    """Our tensor names of one support tensor -> PEFT's, for what it is."""
    if kind == "none":
        return {}
    if kind == "lora":
        return {f"{letter}d": f"{letter}.Xd", f"{letter}u": f"{letter}.Xu"}
    return {letter if letter in "DE" else f"{letter}d": f"{letter}.X"}


_READERS: Mapping[str, Callable[[Config, Tensors, nn.Module, str], Foreign]] = {
    "LORA": read_lora,
    "UNILORA": _unilora,
    "GLORA": _glora,
}
