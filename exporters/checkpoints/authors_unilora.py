"""Uni-LoRA as its authors store it: their fork of PEFT, and their first code for GLUE.

Both keep the indices of every factor and a norm for each entry. Where the norms are `1 / sqrt(n)`, n being how often
the vector's entry is used, the adapter opens as a Uni-LoRA. The first code looked its norms up with indices it had
replaced before, so they need not be that; then the factors are what they are, and open as a LoRA.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.methods.lora import LoRA
from ...passes.methods.unilora.unilora import UniLoRA
from ...rewriter.errors import CheckpointError, listing
from .foreign_adapter import Foreign, all_there, by_site, in_model_order, only_keys, stored_unilora, used_counts, value
from .foreign_keys import base_weights
from .peft_config import check_config, trained_tensors
from .peft_load import same_sites

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]

UNILORA_BANK = "base_model.unilora_vector_bank"
# num_vectors, topk and init_logits_std are left from the method the fork was made of: its code reads none of them
_FORK_FIELDS = {
    *("r", "vector_length", "unilora_dropout", "init_vector_bank_bound"),
    *("num_vectors", "topk", "init_logits_std"),
}


def read_unilora_fork(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`unilora_vector_bank (d,)`, and per site `unilora_logits_A (r, in)`, `unilora_logits_B (out, r)`, whole numbers,
    with `unilora_norm_A`, `unilora_norm_B` of the same shapes."""
    check_config(config, _FORK_FIELDS, what)
    rest = dict(tensors)
    theta = rest.pop(UNILORA_BANK, None)
    if theta is None:
        raise CheckpointError(f"{what} lacks 1 tensor(s): {UNILORA_BANK!r}")
    method = UniLoRA(
        rank=value(config, "r", int, what, 4),
        vector_length=value(config, "vector_length", int, what, 256),
        dropout=value(config, "unilora_dropout", float, what, 0.0),
        init_bound=value(config, "init_vector_bank_bound", float, what, 0.02),
    )
    sites, rest = by_site(rest, r"base_model\.model\.(?P<site>.+)\.unilora_(?P<name>(logits|norm)_[AB])")
    train, values = trained_tensors(config, model, rest, what)
    all_there(sites, ("logits_A", "logits_B", "norm_A", "norm_B"), what)
    same_sites(config, sites, model, what, loosely=True)
    order = in_model_order(sites, model)
    indices = {site: (sites[site]["logits_A"], sites[site]["logits_B"]) for site in order}
    norms = {site: (sites[site]["norm_A"], sites[site]["norm_B"]) for site in order}
    methods, tensors = _opened(method, theta, indices, norms, what)
    return Foreign(methods, {**values, **tensors}, train)


def read_unilora(config: Config, tensors: Tensors, model: nn.Module, what: str) -> Foreign:
    """`vector_bank (d,)`, once or beside every layer, the indices `<site>.project_params_A (in, r)`,
    `.project_params_B (r, out)` and, in newer files, `.norm_factor_A`, `.norm_factor_B` of the same shapes.

    Without norms they are counted from the indices over the whole model. The file may be a whole state dict: what else
    is in it has to be the model's own, and where it differs it comes with the adapter.
    """
    only_keys(config, {"method", "rank", "vector_length", "target_modules"}, what)
    method = UniLoRA(rank=value(config, "rank", int, what), vector_length=value(config, "vector_length", int, what))
    banks = {key: t for key, t in tensors.items() if key.split(".")[-1] == "vector_bank"}
    theta = next(iter(banks.values()), None)
    rest = {key: t for key, t in tensors.items() if key not in banks}
    sites, rest = by_site(rest, r"(?P<site>.+)\.(?P<name>(project_params|norm_factor)_[AB])")
    if theta is None or not sites:
        raise CheckpointError(f"{what} lacks {'vector_bank' if theta is None else 'every project_params tensor'}")
    if other := [key for key, t in banks.items() if t.shape != theta.shape or not torch.equal(t, theta)]:
        raise CheckpointError(f"{what} has several vectors, and Uni-LoRA one: {listing([*banks][:1] + other)}")
    train, values, unknown = base_weights(rest, model, what)
    if unknown:
        raise CheckpointError(f"{what} has {len(unknown)} tensor(s) that are not understood: {listing(unknown)}")
    names = ("project_params_A", "project_params_B")
    normed = any("norm_factor_A" in given or "norm_factor_B" in given for given in sites.values())
    all_there(sites, (*names, "norm_factor_A", "norm_factor_B") if normed else names, what)
    if config.get("target_modules") is not None:
        same_sites(config, sites, model, what, loosely=True)
    for site, given in sites.items():
        if any(tensor.dim() != 2 for tensor in given.values()):
            raise CheckpointError(f"{what}: the indices of {site!r} are not matrices")
    order = in_model_order(sites, model)
    indices = {site: (sites[site][names[0]].t(), sites[site][names[1]].t()) for site in order}
    norms = {s: (sites[s]["norm_factor_A"].t(), sites[s]["norm_factor_B"].t()) for s in order} if normed else None
    methods, given = _opened(method, theta, indices, norms, what)
    return Foreign(methods, {**values, **given}, train)


def _opened(
    method: UniLoRA, theta: Tensor, indices: Pairs, norms: Pairs | None, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Methods and tensors by site: a Uni-LoRA with stored indices, or a LoRA where the norms are others than its."""
    stored, tensors = stored_unilora(method, theta, indices, what)
    if norms is None or _norms_are_counts(indices, norms, method.vector_length, what):
        return dict.fromkeys(indices, stored), tensors
    warnings.warn(
        f"{what}: its norms are not 1 / sqrt(how often an entry is used), as those of the authors' first code are not; "
        "it opens as a LoRA of the same function, and no longer trains one vector",
        stacklevel=5,
    )
    if tuple(theta.shape) != (method.vector_length,):
        raise CheckpointError(f"{what}: the vector is {tuple(theta.shape)}, the config says ({method.vector_length},)")
    factors: dict[str, Tensor] = {}
    for site, pair in indices.items():
        A, B = (theta[index.long()] * norm.to(theta.dtype) for index, norm in zip(pair, norms[site], strict=True))
        factors |= {f"{site}.A": A, f"{site}.B": B}
    lora = LoRA(rank=method.rank, alpha=method.rank, dropout=method.dropout)
    return dict.fromkeys(indices, lora), factors


def _norms_are_counts(indices: Pairs, norms: Pairs, length: int, what: str) -> bool:
    scales = used_counts([index for pair in indices.values() for index in pair], length).double().rsqrt()
    same = True
    for site, pair in norms.items():
        for index, norm in zip(indices[site], pair, strict=True):
            if norm.shape != index.shape or not norm.is_floating_point():
                raise CheckpointError(
                    f"{what}: the norms of {site!r} are {tuple(norm.shape)} {norm.dtype}, its indices "
                    f"{tuple(index.shape)}: expected a floating number for each"
                )
            near = 4 * torch.finfo(norm.dtype).eps
            same &= torch.allclose(norm.double(), scales[index.long()], rtol=near, atol=0)
    return same
