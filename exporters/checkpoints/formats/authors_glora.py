"""GLoRA as its authors store it: per site `Ad, Au, Bd, Bu, Cd, Cu, D, E` of the whole supernet under the model's own
names, and the path of each site in the config.

A path takes its part of the supernet's tensors: the first column for `vector`, the first entry for `constant`, the
first k ranks for `LoRA_k`. Entries that no path reads are not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....passes.methods.glora.glora import GLoRA
from ....passes.methods.glora.path import CHOICES, GLoRAPath
from ....rewriter.errors import CheckpointError, listing
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder, Tensors
from ..foreign.format import Format


def read(folder: ForeignFolder) -> ForeignAdapter:
    what = folder.what
    folder.only_entries({"method", "rank", "paths"})
    rank, paths = folder.value("rank", int), folder.value("paths", dict)
    sites, rest = folder.by_site(folder.tensors, r"(?P<site>.+)\.(?P<name>[ABC][du]|D|E)")
    folder.none_left(rest)
    if without := [site for site in paths if site not in sites]:
        raise CheckpointError(f"{what} lacks the tensors of {len(without)} site(s) with a path: {listing(without)}")
    if without := [site for site in sites if site not in paths]:
        raise CheckpointError(f"{what}: the config has no path for {len(without)} site(s): {listing(without)}")
    methods, values = {}, {}
    for site, given in sites.items():
        path, ranks = _path(paths[site], rank, f"{what}: path of {site!r}")
        _check_ranks(ranks, given, f"{what}: {site!r}")
        most = max(ranks.values(), default=rank)
        methods[site] = GLoRA(rank=most, path=path)
        needed = path.shapes(1, 1, 1, folder.has_bias(site))
        if missing := [f"{site}.{name}" for name in needed if name not in given]:
            raise folder.lacks(missing)
        for name in needed:
            values[f"{site}.{name}"] = _part(given[name], name, getattr(path, name[0]), ranks.get(name[0], 1), most)
    return ForeignAdapter(methods, values)


def _path(given: Any, rank: int, what: str) -> tuple[GLoRAPath, dict[str, int]]:
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


def _check_ranks(ranks: Mapping[str, int], given: Tensors, what: str) -> None:
    """Raise where a path reads more ranks than the supernet's tensors have."""
    for tensor, rank in ranks.items():
        for name, axis in ((f"{tensor}d", 1), (f"{tensor}u", 0)):
            if name in given and given[name].dim() == 2 and given[name].shape[axis] < rank:
                raise CheckpointError(f"{what}: LoRA_{rank} of {name}, which is {tuple(given[name].shape)}")


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


FORMAT = Format(read, entry=lambda config: config.get("method") == "glora")
