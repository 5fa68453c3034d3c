"""Adapters in the formats of the methods' own authors: HydraLoRA, PRoLoRA, LoRA-SB, LoRA-XS, GLoRA, Uni-LoRA.

Each is known by keys that no other format has. The first four are forks of PEFT and carry its prefix and its config,
GLoRA's and Uni-LoRA's first code write the model's own names. `reader_of` tells them apart, a reader translates or
raises. GLoRA's reader is in `authors_glora.py`, Uni-LoRA's two are in `authors_unilora.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.methods.hydralora.hydralora import HydraLoRA
from ...passes.methods.lora import LoRA
from ...passes.methods.lora_xs import LoRAXS
from ...passes.methods.prolora import PRoLoRA, expand
from ...rewriter.errors import CheckpointError
from ...rewriter.state import base_modules
from .authors_glora import read_glora
from .authors_unilora import UNILORA_BANK, read_unilora, read_unilora_fork
from .foreign_adapter import Foreign, all_there, by_site, in_model_order, value
from .peft_config import check_config, is_conv1d, is_linear, trained_tensors
from .peft_load import LORA_FIELDS, lora_at, same_sites

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Reader = Callable[[Config, Tensors, nn.Module, str], Foreign]

_FORK = r"base_model\.model\.(?P<site>.+)\."
_LATENT = "lora_latent_mapping"
# init2zero_via_vec and enable_lora_bias are not among them: only without them are the tensors what they are here
_PROLORA = frozenset(
    {
        *("unshared_r", "reduce_lora_A_x", "reduce_lora_B_x", "enable_lora_rotation", "enable_lora_vec"),
        *("lora_A_shift_size", "lora_B_shift_size"),
    }
)
_PROLORA_NAMES = {
    "lora_A.weight": "A_shared",
    "lora_B.weight": "B_shared",
    "lora_A_vec": "A_unshared",
    "lora_B_vec": "B_unshared",
}


def reader_of(config: Config, tensors: Tensors) -> Reader | None:
    """The reader for a folder of one of these formats, or None."""
    if any(key.endswith(".lora_route.weight") for key in tensors) or config.get("lora_nums") is not None:
        return read_hydralora
    if any(_LATENT in key for key in tensors):
        return read_latent
    if any(".lora_A_vec" in key for key in tensors) or {"reduce_lora_A_x", "unshared_r"} & set(config):
        return read_prolora
    if any(".unilora_logits_" in key for key in tensors) or UNILORA_BANK in tensors:
        return read_unilora_fork
    if config.get("method") == "unilora" or any(key.split(".")[-1] == "vector_bank" for key in tensors):
        return read_unilora
    if config.get("method") == "glora":
        return read_glora
    return None


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
    if experts > len(tensors):  # before names and tensors of so many are made up
        raise CheckpointError(f"{what}: its config says {experts} experts, and it has {len(tensors)} tensors in all")
    names = ["lora_route", "lora_A", *(f"lora_B{i}" for i in range(experts))]
    sites, rest = by_site(tensors, _FORK + rf"(?P<name>{'|'.join(names)})\.weight")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, names, what)
    same_sites(config, sites, model, what, loosely=True)
    for site, given in sites.items():
        blocks = [given[f"lora_B{i}"] for i in range(experts)]
        if odd := [f"lora_B{i} {tuple(b.shape)}" for i, b in enumerate(blocks) if b.shape != blocks[0].shape]:
            raise CheckpointError(f"{what}: the experts of {site!r} differ in shape: {', '.join(odd)}")
        values |= {f"{site}.A": given["lora_A"], f"{site}.router": given["lora_route"]}
        values[f"{site}.B"] = torch.cat([block.t() for block in blocks])
    return Foreign(dict.fromkeys(in_model_order(sites, model), method), values, train)


def read_latent(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """LoRA-XS and LoRA-SB: PEFT's LoRA plus `<adapter>_lora_latent_mapping.weight (r, r)` between A and B.

    Both open as `LoRAXS`, which differs from LoRA-SB in its initialisation only; its alpha says the stored scale.
    """
    check_config(config, LORA_FIELDS, what)
    sites, rest = by_site(tensors, _FORK + r"(?P<name>lora_[AB])\.weight")
    middle, rest = by_site(rest, rf"base_model\.model\.(?P<site>.+)_(?P<name>{_LATENT})\.weight")
    for full, given in middle.items():
        # PEFT drops `.<adapter>` from its keys wherever it stands, and here that is half of a name
        site = full if full in sites else full.rpartition(".")[0]
        if site not in sites or _LATENT in sites[site]:
            raise CheckpointError(f"{what}: '{full}_{_LATENT}' belongs to no layer with a lora_A and a lora_B")
        sites[site] |= given
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, ("lora_A", "lora_B", _LATENT), what)
    same_sites(config, sites, model, what, loosely=True)
    methods = {}
    for site in in_model_order(sites, model):
        lora, given = lora_at(config, site, what), sites[site]
        alpha = lora.scale * lora.rank if lora.rslora else lora.alpha
        methods[site] = LoRAXS(rank=lora.rank, alpha=alpha, dropout=lora.dropout)
        values |= {f"{site}.A": given["lora_A"], f"{site}.B": given["lora_B"], f"{site}.R": given[_LATENT]}
    return Foreign(methods, values, train)


def read_prolora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`lora_A.weight (q, ceil(in/m))`, `lora_B.weight (ceil(out/n), q)` and, where `u > 0`, `lora_A_vec (u, in)`,
    `lora_B_vec (u, out)`.

    Without rotation, or with steps that are not the method's own, it opens as the LoRA that is the same function.
    """
    check_config(config, LORA_FIELDS - {"use_rslora", "rank_pattern", "alpha_pattern"} | _PROLORA, what)
    method = PRoLoRA(
        rank=value(config, "r", int, what),
        unshared=value(config, "unshared_r", int, what, 0),
        a_chunks=value(config, "reduce_lora_A_x", int, what),
        b_chunks=value(config, "reduce_lora_B_x", int, what),
        alpha=value(config, "lora_alpha", float, what),
        dropout=value(config, "lora_dropout", float, what, 0.0),
    )
    if method.unshared and not value(config, "enable_lora_vec", bool, what, True):
        raise CheckpointError(f"{what}: enable_lora_vec=False and unshared_r={method.unshared} contradict each other")
    absent = {name for name in _PROLORA_NAMES if not (method.unshared if "_vec" in name else method.shared)}
    sites, rest = by_site(tensors, _FORK + rf"(?P<name>{'|'.join(map(re.escape, _PROLORA_NAMES))})")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, [name for name in _PROLORA_NAMES if name not in absent], what)
    same_sites(config, sites, model, what, loosely=True)
    steps = _steps(config, method, what)
    order = in_model_order(sites, model)
    for site, given in sites.items():
        for name in absent & set(given):  # of rank 0: stored without elements, or not at all
            if given[name].numel():
                raise CheckpointError(f"{what}: '{site}.{name}' has values, and unshared_r leaves it no rank")
        ours = {_PROLORA_NAMES[name]: tensor for name, tensor in given.items() if name not in absent}
        if "B_unshared" in ours:
            ours["B_unshared"] = ours["B_unshared"].t()
        if steps is not None:
            ours = _expanded(ours, method, steps, site, model, what)
        values |= {f"{site}.{name}": tensor for name, tensor in ours.items()}
    if steps is None:
        return Foreign(dict.fromkeys(order, method), values, train)
    warnings.warn(
        f"{what}: its chunks are not rotated as PRoLoRA's are; it opens as a LoRA of the same function", stacklevel=4
    )
    return Foreign(dict.fromkeys(order, LoRA(method.rank, method.alpha, method.dropout)), values, train)


def _steps(config: Config, method: PRoLoRA, what: str) -> tuple[int, int] | None:
    """By how many ranks A's and B's copies are rotated, one against the next; None where that is PRoLoRA's own."""
    own = tuple(max(method.shared // chunks, 1) for chunks in (method.a_chunks, method.b_chunks))
    if value(config, "enable_lora_rotation", bool, what, True):
        keys = ("lora_A_shift_size", "lora_B_shift_size")
        steps = tuple(value(config, key, int, what, step) for key, step in zip(keys, own, strict=True))
    else:
        steps = (0, 0)
    same = all((a - b) % max(method.shared, 1) == 0 for a, b in zip(steps, own, strict=True))
    return None if same else (steps[0], steps[1])


def _expanded(
    given: Mapping[str, Tensor], method: PRoLoRA, steps: tuple[int, int], site: str, model: nn.Module, what: str
) -> dict[str, Tensor]:
    """The factors in full, `A (r, in)` and `B (out, r)`, rotated by these steps instead of the method's own."""
    layer = dict(base_modules(model)).get(site)
    if layer is None or not is_linear(layer):
        raise CheckpointError(f"{what} was made for another model: this {type(model).__name__} has no layer {site!r}")
    weight: Any = layer.weight
    long = tuple(weight.shape if is_conv1d(layer) else weight.shape[::-1])
    q, factors = method.shared, []
    kinds = (("A", method.a_chunks, given["A_shared"]), ("B", method.b_chunks, given["B_shared"].t()))
    for (letter, chunks, chunk), length, step in zip(kinds, long, steps, strict=True):
        if tuple(chunk.shape) != (q, -(-length // chunks)) or chunks > length:
            raise CheckpointError(f"{what}: chunk {letter} of {site!r} is {tuple(chunk.shape)}, long side {length}")
        rows = (torch.arange(q)[:, None] + step * torch.arange(chunks)) % q
        factors.append(expand(chunk, rows, length))
    A, B = factors[0], factors[1].t()
    if method.unshared:
        A, B = torch.cat([A, given["A_unshared"].to(A.dtype)]), torch.cat([B, given["B_unshared"].to(B.dtype)], 1)
    return {"A": A, "B": B}
