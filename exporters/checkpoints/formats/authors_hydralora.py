"""HydraLoRA as its authors' fork of PEFT stores it: per site `lora_route.weight (N, in)`, `lora_A.weight (r, in)`, and
`lora_B{i}.weight (out, r)` for each expert i.

The authors draw a dropout mask per expert; that is `HydraLoRA(per_expert_dropout=True)`, off after a load.
"""

from __future__ import annotations

import torch

from ....passes.methods.hydralora.hydralora import HydraLoRA
from ....rewriter.errors import CheckpointError
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format
from ..foreign.peft_folder import check_config, check_sites, peft_sites


def read(folder: ForeignFolder) -> ForeignAdapter:
    what = folder.what
    # the balance loss and how the fork merged are matters of training
    check_config(folder, {"r", "lora_alpha", "lora_dropout", "lora_nums", "blc_alpha", "blc_weight", "merge_weights"})
    experts = folder.value("lora_nums", int)
    method = HydraLoRA(
        rank=folder.value("r", int),
        experts=experts,
        alpha=folder.value("lora_alpha", float),
        dropout=folder.value("lora_dropout", float, 0.0),
    )
    if experts > (count := len(folder.tensors)):  # before names and tensors of so many are made up
        raise CheckpointError(f"{what}: its config says {experts} experts, and it has {count} tensors in all")
    names = ["lora_route", "lora_A", *(f"lora_B{i}" for i in range(experts))]
    sites, train, values = peft_sites(folder, rf"(?P<name>{'|'.join(names)})\.weight")
    check_sites(folder, sites, names, loosely=True)
    for site, given in sites.items():
        blocks = [given[f"lora_B{i}"] for i in range(experts)]
        if odd := [f"lora_B{i} {tuple(b.shape)}" for i, b in enumerate(blocks) if b.shape != blocks[0].shape]:
            raise CheckpointError(f"{what}: the experts of {site!r} differ in shape: {', '.join(odd)}")
        values |= {f"{site}.A": given["lora_A"], f"{site}.router": given["lora_route"]}
        values[f"{site}.B"] = torch.cat([block.t() for block in blocks])
    return ForeignAdapter(dict.fromkeys(sites, method), values, train)


FORMAT = Format(
    read,
    names=r"lora_route|lora_[AB]\d*",
    key=r"\.lora_route\.weight$",
    entry=lambda config: config.get("lora_nums") is not None,
)
