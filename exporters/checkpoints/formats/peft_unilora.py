"""Uni-LoRA as HF PEFT stores it (0.21): `base_model.unilora_theta_d (d,)` and, with `save_indices`, per site
`unilora_indices_A (r, in)`, `unilora_indices_B (out, r)` and `unilora_scales_A`, `unilora_scales_B` of the same shapes.

Without indices nothing but the config's patterns says where it goes, and the projection is handed out in model order.
"""

from __future__ import annotations

import numpy as np
from torch import fx

from ....passes.methods.unilora.unilora import UniLoRA, balanced_indices
from ....rewriter.base_names import base_modules
from ....rewriter.errors import CheckpointError
from ....rewriter.modules.wrappers import unwrap
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format, OwnAdapter, Written
from ..foreign.peft_folder import check_config, check_sites, peft_sites
from ..foreign.peft_targets import told_names
from ..foreign.plain_keys import PREFIX
from ..foreign.unilora_indices import flat, not_counts, pairs, stored_unilora

THETA = "base_model.unilora_theta_d"


def read(folder: ForeignFolder) -> ForeignAdapter:
    config, what = folder.config, folder.what
    check_config(folder, {"r", "theta_d_length", "proj_seed", "unilora_dropout", "init_theta_d_bound", "save_indices"})
    method = UniLoRA(
        rank=folder.value("r", int, 4),
        vector_length=folder.value("theta_d_length", int, 256),
        seed=folder.value("proj_seed", int, 42),
        dropout=folder.value("unilora_dropout", float, 0.0),
        init_bound=folder.value("init_theta_d_bound", float, 0.02),
    )
    rest = dict(folder.tensors)
    theta = rest.pop(THETA, None)
    if theta is None:
        raise folder.lacks([THETA])
    sites, train, values = peft_sites(folder, r"unilora_(?P<name>(indices|scales)_[AB])", rest)
    if not sites:
        if config.get("save_indices"):
            raise CheckpointError(f"{what} was saved with save_indices, and lacks every unilora_indices tensor")
        names = told_names(config, folder.model, what)
        if isinstance(unwrap(folder.model), fx.GraphModule):
            raise CheckpointError(
                f"{what} stores no indices; they count in the order of the model's modules, which a graph may have "
                "lost. Open it on the model itself"
            )
        if not names:
            raise CheckpointError(
                f"{what} stores no indices, so its target_modules have to say where it goes, and "
                f"{config.get('target_modules')!r} names no linear layer of this {type(folder.model).__name__}"
            )
        return ForeignAdapter(dict.fromkeys(names, method), {**values, "theta": theta}, train)
    check_sites(folder, sites, ("indices_A", "indices_B", "scales_A", "scales_B"))
    indices = pairs(sites, "indices", folder.model)
    stored, given = stored_unilora(method, theta, indices, what)
    if odd := not_counts(indices, pairs(sites, "scales", folder.model), method.vector_length, what):
        raise CheckpointError(
            f"{what}: the scales of {odd[0]} are not 1 / sqrt(how often each entry is used); this is not a Uni-LoRA "
            "projection, or its base was quantised when it was saved"
        )
    order = flat(indices)
    if np.array_equal(order, balanced_indices(order.size, method.vector_length, method.seed)):
        return ForeignAdapter(dict.fromkeys(sites, method), {**values, "theta": theta}, train)
    return ForeignAdapter(dict.fromkeys(sites, stored), {**values, **given}, train)


def write(adapter: OwnAdapter) -> Written:
    root, record, what = adapter.root, adapter.record, adapter.what
    method = adapter.only_method("vector per Uni-LoRA")
    given_out = [site.name for site in record.sites]
    order = [name for name, _ in base_modules(root) if name in set(given_out)]
    ordered = given_out == order and not isinstance(root, fx.GraphModule)  # a graph may list modules otherwise
    derived = method.sampler == "balanced" and ordered
    if adapter.save_indices is False and not derived:
        raise CheckpointError(
            f"{what} without its indices: PEFT would derive others (here sampler={method.sampler!r}); leave "
            "save_indices out, or set it to True"
        )
    saved = not derived if adapter.save_indices is None else adapter.save_indices
    common = next(iter(adapter.sites.values())).shared_tensors()
    fields = {
        "peft_type": "UNILORA",
        "r": method.rank,
        "theta_d_length": method.vector_length,
        "proj_seed": method.seed,
        "unilora_dropout": method.dropout,
        "init_theta_d_bound": method.init_bound,
        "save_indices": saved,
        "fan_in_fan_out": adapter.on_conv1d,
    }
    tensors = {THETA: common["theta"]}
    if saved:
        scales = common["counts"].float().rsqrt()
        for name, module in adapter.sites.items():
            given = module.tensors()
            for letter, index in (("A", given["index_a"].long()), ("B", given["index_b"].long().t())):
                tensors[f"{PREFIX}{name}.unilora_indices_{letter}"] = index
                tensors[f"{PREFIX}{name}.unilora_scales_{letter}"] = scales[index]
    return fields, tensors


FORMAT = Format(read, names=r"unilora_\w+", peft_type="UNILORA", method=UniLoRA, write=write, has_indices=True)
