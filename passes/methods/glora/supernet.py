"""A GLoRA supernet's paths: set them for evaluation, or fix them for good.

supernet, {site: path}  ->  the same model with every site on its path, and only that path's parameters
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....rewriter.adapter_tensors import AdapterTensors
from ....rewriter.capture.skeleton import copy_skeleton
from ....rewriter.create import graft_adapter
from ....rewriter.errors import AdapterError, SpecError, listing, near_misses
from ....rewriter.modules.wrappers import M, unwrap
from ....rewriter.state import record_of
from ....rewriter.switch import active_weights, remove, set_active
from ....rewriter.tensors import adapter_modules, adapter_state, swap
from .glora import GLoRA
from .path import PATHS, GLoRAPath, path_from_dict

Paths = Mapping[str, "GLoRAPath | Mapping[str, str]"]


def supernet_sites(model: nn.Module, name: str = "default") -> dict[str, AdapterTensors]:
    """The sites of an adapter that still choose among paths, by name, in model order.

    Raises:
        AdapterError: the model has no such adapter, or none of its sites is a supernet.
    """
    root = unwrap(model)
    found = {}
    for _, tensors in adapter_modules(root, name, record_of(root, name)):
        if tensors.site is not None and isinstance(tensors.method, GLoRA) and tensors.method.path is None:
            found[tensors.site.name] = tensors
    if not found:
        raise AdapterError(f"adapter {name!r} has no site that chooses among paths; GLoRA(path=None) makes a supernet")
    return found


def _checked(paths: Paths, sites: Mapping[str, AdapterTensors], what: str) -> dict[str, GLoRAPath]:
    if not isinstance(paths, Mapping):
        raise AdapterError(f"{what}({paths!r}): give a path for every site, as {{site: GLoRAPath(...)}}")
    if unknown := [site for site in paths if site not in sites]:
        close = near_misses(unknown[0], sites, 3)
        raise AdapterError(f"{what}: {listing(unknown)} is no supernet site of this model; close are {listing(close)}")
    if missing := [site for site in sites if site not in paths]:
        raise AdapterError(f"{what}: no path for {len(missing)} site(s): {listing(missing)}")
    checked = {}
    for site in sites:
        path = paths[site]
        checked[site] = path_from_dict(path) if isinstance(path, Mapping) else path
        if not isinstance(checked[site], GLoRAPath):
            raise SpecError(f"{what}: {path!r} for {site!r} is not a GLoRAPath")
    return checked


def set_paths(supernet: nn.Module, paths: Paths, name: str = "default") -> None:
    """Set the path that each site of a supernet takes in eval mode, in place. Training keeps drawing.

    A compiled model is not compiled anew. Copies of the model keep their own paths; a saved adapter has none, and opens
    on the first of them all.

    Raises:
        AdapterError: a site without a path, or a name that is no site.
    """
    sites = supernet_sites(supernet, name)
    for site, path in _checked(paths, sites, "set_paths").items():
        old = sites[site]._buffers["path"]
        assert old is not None
        # a new tensor, because copies of the model share buffers that are derived from the config
        sites[site]._buffers["path"] = torch.full_like(old, path.index)


def get_paths(supernet: nn.Module, name: str = "default") -> dict[str, GLoRAPath]:
    """The paths the sites of a supernet take in eval mode."""
    return {site: PATHS[int(tensors._buffers["path"])] for site, tensors in supernet_sites(supernet, name).items()}  # type: ignore[arg-type]


def fix_paths(supernet: M, paths: Paths, name: str = "default") -> M:
    """A new adapted model whose sites have these paths for good; `supernet` stays as it is.

    Every site keeps only the entries its path uses, with the supernet's values, and only they train: `Xd[:, :1]` for
    `vector`, one number for `constant`. A site on a path of nothing keeps no tensor. Trained modules come along.

    Args:
        paths: site name -> `GLoRAPath` (or its dict), for every supernet site: `search_paths(...).paths`.
        name: the supernet's adapter; the fixed one has the same name.

    Raises:
        AdapterError: a site without a path, or a name that is no site.
    """
    root = unwrap(supernet)
    sites = supernet_sites(root, name)
    chosen = _checked(paths, sites, "fix_paths")
    record, active = record_of(root, name), active_weights(root)
    values: dict[str, Tensor] = dict(adapter_state(root, name))
    overrides: dict[str, Any] = {}
    for site, path in chosen.items():
        tensors = sites[site]
        assert isinstance(tensors.method, GLoRA) and tensors.site is not None
        # overrides are looked up by the weight's name, which the parts of a fused weight share
        weight = site if tensors.site.whole else site[: site.rindex("[")]
        overrides["re:" + re.escape(weight) + ("" if tensors.site.whole else r"(\[\d+\])?")] = replace(
            tensors.method, path=path
        )
        prefix = f"{site}." if site else ""
        given = {key: values.pop(prefix + key) for key, _ in tensors.named_parameters()}
        kept = path.take(given, tensors.method.rank, tensors.site.bias is not None)
        values |= {prefix + key: value for key, value in kept.items()}
    spec = replace(record.spec, overrides={**overrides, **record.spec.overrides})

    fixed = copy_skeleton(root)
    remove(fixed, name)
    dtype = next(iter(sites.values())).Ad.dtype
    fixed = graft_adapter(fixed, spec, name, dtype=dtype, initialise=False, fit=record.fitted)  # type: ignore[arg-type]
    for group in record_of(fixed, name).groups:
        made = getattr(group.method, "path", None)
        if wrong := [s.name for s in group.sites if s.name in chosen and made != chosen[s.name]]:
            raise AdapterError(f"fix_paths: the parts of one fused weight need one path, {listing(wrong)} have several")
    swap(fixed, values, name)
    set_active(fixed, active)
    return fixed
