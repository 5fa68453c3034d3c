"""GLoRA as HF PEFT stores it (0.21): per site `glora_<A to E>.Xd` and `.Xu`, `.X` or `.zeros`, by what the config says
each of the five support tensors is."""

from __future__ import annotations

from dataclasses import replace

import torch

from ....passes.methods.glora.glora import GLoRA
from ....passes.methods.glora.path import CHOICES, GLoRAPath
from ....rewriter.errors import CheckpointError, listing
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format, OwnAdapter, Written
from ..foreign.peft_folder import check_config, check_sites, peft_sites
from ..foreign.plain_keys import PREFIX

LEAVES = ("Xd", "Xu", "X", "zeros")


def read(folder: ForeignFolder) -> ForeignAdapter:
    what = folder.what
    check_config(folder, {"r", "config_A_B", "config_C", "config_D_E"})
    rank = folder.value("r", int, 8)
    both, C = folder.value("config_A_B", str, "lora"), folder.value("config_C", str, "lora")
    line = folder.value("config_D_E", str, "constant")
    path = GLoRAPath(A=both, B=both, C=C, D=line, E=line)
    sites, train, values = peft_sites(folder, rf"glora_(?P<name>[A-E]\.({'|'.join(LEAVES)}))")
    check_sites(folder, sites)
    methods = {}
    for site, stored in sites.items():
        given = dict(stored)
        # PEFT leaves C, D and E out where the base has no bias, whatever the config says
        here = path if folder.has_bias(site) else replace(path, C="none", D="none", E="none")
        methods[site] = GLoRA(rank=rank, path=here)
        for letter in CHOICES:
            zeros = given.pop(f"{letter}.zeros", None) if getattr(here, letter) == "none" else None
            if zeros is not None and zeros.any():
                raise CheckpointError(f"{what}: {site}.glora_{letter}.zeros is not zero")
        for ours, shape in here.shapes(1, 1, 1).items():
            letter = ours[0]
            theirs = f"{letter}.X{ours[1:] if getattr(here, letter) == 'lora' else ''}"
            if theirs not in given:
                raise folder.lacks([f"{site}.glora_{theirs}"])
            tensor = given.pop(theirs)
            scalar = letter in "AB" and getattr(here, letter) == "constant" and tensor.numel() == 1
            values[f"{site}.{ours}"] = tensor.reshape(shape) if scalar else tensor
        if given:
            raise CheckpointError(
                f"{what}: {site!r} has {here} here and also has tensors that are not understood: "
                f"{listing(f'glora_{name}' for name in given)}"
            )
    return ForeignAdapter(methods, values, train)


def write(adapter: OwnAdapter) -> Written:
    what, record, methods = adapter.what, adapter.record, adapter.methods
    if any(method.path is None for method in methods.values()):
        raise CheckpointError(f"{what}: PEFT has no supernet; fg.fix_paths(adapted, paths) gives every site one path")
    if other := [site.name for site in record.sites if site.form != "linear"]:
        raise CheckpointError(f"{what}: PEFT's GLoRA takes nn.Linear only, and not {listing(other)}")
    paths: dict[bool, list[GLoRAPath]] = {True: [], False: []}
    for site in record.sites:
        path, biased = methods[site.name].path, site.bias is not None
        here = path if biased else replace(path, D="none")  # nothing to scale there
        if here.A != here.B or here.D != here.E or not (biased or here.C == here.E == "none"):
            raise CheckpointError(
                f"{what}: {site.name!r} has {path}, and PEFT knows one choice for A and B, one for D and E, and "
                "neither C, D nor E where the base has no bias. fg.merge(adapted) folds any path into the model"
            )
        paths[biased].append(here)
    on_biased = paths[True] or [GLoRAPath("none", "none", "none", "none", "none")]
    fields = {
        "peft_type": "GLORA",
        "r": adapter.one((m.rank for m in methods.values()), "r"),
        "config_A_B": adapter.one((p.A for p in paths[True] + paths[False]), "config_A_B"),
        "config_C": adapter.one((p.C for p in on_biased), "config_C"),
        "config_D_E": adapter.one((p.E for p in on_biased), "config_D_E"),
    }
    tensors = {}
    for site in record.sites:
        given = adapter.sites[site.name].tensors()
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


FORMAT = Format(read, names="glora_[A-E]", leaves=LEAVES, peft_type="GLORA", method=GLoRA, write=write)
