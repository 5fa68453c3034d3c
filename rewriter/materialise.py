"""`fg.materialise`: values for the adapter tensors of a model that was made on the meta device, or emptied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_tensors import AdapterTensors
from .base_names import weight_at
from .errors import AdapterError, listing
from .modules.missing_values import missing, settle
from .modules.shards import full
from .modules.wrappers import M, unwrap
from .one_by_one import OneByOne
from .products import stacked_matrices
from .program_verbs import over_programs
from .quantised.quantised import quantised
from .sites import Site
from .state import Group, grafted_modules, record_of, state_of
from .tensors import adapter_modules, trained_modules


@over_programs
@torch.inference_mode(False)
@torch.no_grad()
def materialise(model: M) -> M:
    """Give values to the adapter tensors that have none, in place; returns the model.

    For a model that was made on the meta device and then filled (`to_empty()` and a load, `load_state_dict(
    assign=True)`, FSDP2). Derived tensors (Uni-LoRA's indices, GLoRA's choices) come from the config; trainable and
    frozen ones that nothing was loaded into are initialised as `rewrite` would; modules trained in full start from the
    base's values. What was loaded stays. Load the base weights first: LoRA-XS starts from their singular vectors.

    Raises:
        AdapterError: the model has no adapter, or base weights that are needed are on the meta device.
        SpecError: the method starts from an estimate (LoRA-SB): load its tensors.
    """
    root, state = unwrap(model), state_of(model)
    modules = grafted_modules(root)
    made: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for name in state.adapters:
        record = record_of(root, name)
        sites = {t.site.name: t for _, t in adapter_modules(root, name, record, modules) if t.site is not None}
        for group in record.groups:
            made += _values(group, [sites[site.name] for site in group.sites], modules)
        for path, copy in trained_modules(root, name, record, modules).items():
            made += _base_values(path, modules[path], copy)
    for module, values in made:
        for key, value in values.items():
            _put(module, key, value)
        settle(module)
    return model


def _values(
    group: Group, places: list[AdapterTensors], modules: Mapping[str, nn.Module]
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The values that a group's tensors lack, made beside them."""
    shared: AdapterTensors | None = places[0].__dict__["shared"]
    holders = [*places, *([shared] if shared is not None else [])]
    lacking = {id(holder): missing(holder) for holder in holders}
    if not any(lacking.values()):
        return []
    devices = [_device(modules, site) for site in group.sites]
    if absent := [site.name for site, device in zip(group.sites, devices, strict=True) if device.type == "meta"]:
        raise AdapterError(f"the base weights of {listing(absent, 4)} are on the meta device: load them first")
    device = devices[0]
    fresh = {
        id(holder): {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in holder.tensors().items()}
        for holder in holders
    }
    common = fresh[id(shared)] if shared is not None else {}
    local = [fresh[id(place)] for place in places]
    stacked_matrices.derive(group.method, group.sites, common, local)
    if any(n not in holder._non_persistent_buffers_set for holder in holders for n in lacking[id(holder)]):
        stored = OneByOne(len(group.sites), lambda i: full(weight_at(modules, group.sites[i]).detach()))
        stacked_matrices.initialise(group.method, group.sites, common, local, stored)
    return [(holder, {n: fresh[id(holder)][n] for n in lacking[id(holder)]}) for holder in holders]


def _device(modules: Mapping[str, nn.Module], site: Site) -> torch.device:
    """Where a site's base weight is."""
    owner = modules[site.owner]
    return weight_at(modules, site).device if (kind := quantised(owner)) is None else kind.device(owner)


def _base_values(path: str, base: nn.Module, copy: nn.Module) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Values for a module trained in full whose tensors are on the meta device still, or emptied: NaN throughout."""
    found = []
    for inner, module in copy.named_modules():
        own = base.get_submodule(inner)
        held = {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}
        values: dict[str, Any] = {n: {**own._parameters, **own._buffers}[n] for n, t in held.items() if _is_empty(t)}
        if any(value is None or value.is_meta for value in values.values()):
            raise AdapterError(f"the base's {path!r} is on the meta device: load it first")
        if values:
            found.append((module, {n: full(value.detach()).clone() for n, value in values.items()}))
    return found


def _is_empty(tensor: Tensor) -> bool:
    if tensor.is_meta:
        return True
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(torch.isnan(full(tensor.detach())).all())


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    slots: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    current = slots[name]
    if hasattr(current, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, current.device_mesh, current.placements)
    if not current.is_meta:
        current.copy_(value)
    elif isinstance(current, nn.Parameter):
        slots[name] = nn.Parameter(value, requires_grad=current.requires_grad)
    else:
        slots[name] = value
