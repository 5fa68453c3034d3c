"""Uni-LoRA as its authors' first code, for GLUE, stores it: `vector_bank (d,)`, once or beside every layer, and
per site, under the model's own names, the indices `project_params_A (in, r)`, `project_params_B (r, out)` and, in newer
files, `norm_factor_A`, `norm_factor_B` of the same shapes.

Without norms they are counted from the indices over the whole model. The file may be a whole state dict: what else is
in it has to be the model's own, and where it differs it comes with the adapter.
"""

from __future__ import annotations

import torch

from ....passes.methods.unilora.unilora import UniLoRA
from ....rewriter.errors import CheckpointError, listing
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format
from ..foreign.peft_folder import check_sites
from ..foreign.stored_modules import base_weights
from ..foreign.unilora_indices import pairs
from .authors_unilora import opened


def read(folder: ForeignFolder) -> ForeignAdapter:
    what = folder.what
    folder.only_entries({"method", "rank", "vector_length", "target_modules"})
    method = UniLoRA(rank=folder.value("rank", int), vector_length=folder.value("vector_length", int))
    banks = {key: t for key, t in folder.tensors.items() if key.split(".")[-1] == "vector_bank"}
    theta = next(iter(banks.values()), None)
    rest = {key: t for key, t in folder.tensors.items() if key not in banks}
    sites, rest = folder.by_site(rest, r"(?P<site>.+)\.(?P<name>(project_params|norm_factor)_[AB])")
    if theta is None or not sites:
        raise CheckpointError(f"{what} lacks {'vector_bank' if theta is None else 'every project_params tensor'}")
    if other := [key for key, t in banks.items() if t.shape != theta.shape or not torch.equal(t, theta)]:
        raise CheckpointError(f"{what} has several vectors, and Uni-LoRA one: {listing([*banks][:1] + other)}")
    train, values, unknown = base_weights(folder, rest)
    folder.none_left(unknown)
    normed = any("norm_factor_A" in given or "norm_factor_B" in given for given in sites.values())
    stems = ("project_params", "norm_factor") if normed else ("project_params",)
    check_sites(folder, sites, [f"{stem}_{letter}" for stem in stems for letter in "AB"], loosely=True)
    for site, given in sites.items():
        if any(tensor.dim() != 2 for tensor in given.values()):
            raise CheckpointError(f"{what}: the indices of {site!r} are not matrices")
    turned = {site: {name: t.t() for name, t in given.items()} for site, given in sites.items()}
    indices, *norms = (pairs(turned, stem, folder.model) for stem in stems)
    return opened(folder, method, theta, indices, norms[0] if norms else None, train, values)


FORMAT = Format(read, key=r"(^|\.)vector_bank$", entry=lambda config: config.get("method") == "unilora")
