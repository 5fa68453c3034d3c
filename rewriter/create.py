"""Making an adapter in a module. Everything is checked first; a call that raises has changed nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapter_tensors import ADAPTERS, PARAMETERS, SHARED, AdapterTensors, Container, TrainedParameters
from .analysis.dataflow import storage_key
from .base_names import base_modules, base_parameters, weight_at
from .capture.parent_reads import rebind_forwards
from .capture.skeleton import copy_skeleton
from .errors import AdapterError, SpecError
from .graft import add_adapter, host, tie
from .graft_plan import Plan, declare, plan
from .grafted_class import BASE, plain_view, restore_class
from .method import Decl, Declaration, Method
from .modules import missing_values
from .modules.bias_slot import bias_slot
from .modules.foreign_tuners import check_no_tuners
from .modules.offloaded import check_reachable, loaded, shared_stores
from .modules.placement import check_placed, on_mesh, place, replicate
from .modules.quantised_sites import check_quantised, guard_quantised
from .modules.save_hook import take_over_saving
from .modules.scripted import check_initialised
from .modules.shards import check_unsharded, full, is_sharded
from .modules.wrappers import M, unwrap
from .one_by_one import OneByOne
from .products import stacked_matrices
from .sites import Site
from .spec import Spec
from .state import STATE, AdapterRecord, Group, ModelState, grafted_modules
from .switch import set_active
from .targets import Resolution, check_name, resolve

_NARROW = (torch.float16, torch.bfloat16)


@torch.inference_mode(False)  # an adapter made inside inference mode could not be trained afterwards
def graft_adapter(
    model: M,
    spec: Spec,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    update: Any = None,
    initialise: bool = True,
    order: Sequence[str] = (),
    check: Callable[[Plan], None] | None = None,
    fit: bool = False,
) -> M:
    """`rewrite` for modules.

    Args:
        initialise: False leaves the trainable and frozen tensors for a load to fill.
        order: names of sites in the order they count in, where that is not the order of the model's modules: an
            exported module may list its submodules otherwise, and methods with one projection for all sites
            (Uni-LoRA) hand it out in order.
        fit: let methods take less at sites that are too small for them. False reads the spec to the letter, as for
            tensors that are there already.
        check: is shown what will be made before any of it is, and may raise.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise AdapterError(f"rewrite(dtype={dtype}): adapter tensors are of a floating type")
    source = unwrap(model)
    if isinstance(source, torch.fx.GraphModule):
        from .capture.outline import outline_linears

        source = outline_linears(source)  # type: ignore[assignment]
    check_name(source, name)
    check_no_tuners(source)
    check_unsharded(source)
    check_initialised(source)
    resolution = resolve(source, spec, order, fit)
    groups = _group(resolution, order)
    given = dict(base_modules(source))
    check_reachable(given, (p for s, _ in resolution.sites for p in (s.owner, s.computed)))
    declared = declare(groups)
    if check is not None:
        check(plan(groups, declared, resolution.train, resolution.parameters, given))
    check_quantised(given, groups, resolution.train, training=initialise)
    adapted = copy_skeleton(source)
    guard_quantised(dict(base_modules(adapted)))
    state = adapted.__dict__.setdefault(STATE, ModelState())
    if not state.adapters:
        state.trained = frozenset(n for n, p in base_parameters(source) if p.requires_grad)
    modules = grafted_modules(adapted)
    for group in groups:
        check_placed(group.method, group.sites, modules)
        for site in group.sites:
            without = site.host is not None or bias_slot(modules[site.owner], site) is None
            if site.bias is None and without and (instead := group.method.adds_bias(site)) is not None:
                raise SpecError(
                    f"{type(group.method).__name__} gives {site.name!r} a bias, and the owner's forward adds none to "
                    f"this product: it could never be merged. Exclude the site, or {instead}"
                )
    for index, (group, tensors) in enumerate(zip(groups, declared, strict=True)):
        _create(adapted, modules, group, tensors, index, name, dtype, update, initialise)
    for site in (site for group in groups for site in group.sites if site.host is not None):
        host(modules[site.computed], name, site.within)
    copies = _trainable_copies(modules, resolution.train, spec.keep_ties)
    for path, twin in copies.items():
        add_adapter(modules[path], name, twin)
    _train_parameters(modules, resolution.parameters, name, spec.keep_ties)
    for tied in resolution.ties:
        tie(modules[tied.path], name, tied.attribute, copies[tied.trained], tied.name)
    state.adapters[name] = AdapterRecord(
        spec,
        groups,
        resolution.train,
        ties=resolution.ties,
        parameters=resolution.parameters,
        left=resolution.left,
    )
    set_active(adapted, [name])
    rebind_forwards(adapted, (modules[path] for path in state.adapters[name].owners))
    take_over_saving(adapted)
    return adapted


def _group(resolution: Resolution, order: Sequence[str]) -> tuple[Group, ...]:
    position = {name: i for i, name in enumerate(order)}
    by_method: dict[Method, list[Site]] = {}
    for site, method in sorted(resolution.sites, key=lambda found: position.get(found[0].name, len(position))):
        by_method.setdefault(method, []).append(site)
    return tuple(Group(method, tuple(sites)) for method, sites in by_method.items())


def adapter_dtype(weight: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of adapter tensors on a base weight of this dtype."""
    if asked is not None:
        return asked
    return torch.float32 if weight in _NARROW or not weight.is_floating_point or weight.itemsize < 4 else weight


def _register(module: nn.Module, decls: Mapping[str, Decl], dtype: torch.dtype, device: torch.device) -> None:
    for name, decl in decls.items():
        tensor = torch.empty(decl.shape, dtype=decl.dtype or dtype, device=device)
        if decl.role == "trainable":
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor, persistent=decl.role == "frozen")


def _create(
    adapted: nn.Module,
    modules: Mapping[str, nn.Module],
    group: Group,
    declared: Declaration,
    index: int,
    name: str,
    dtype: torch.dtype | None,
    update: Any,
    initialise: bool,
) -> None:
    """Make, register, derive and initialise the tensors of one group."""
    first = group.sites[0]
    shared = None
    if declared.shared:
        shared = AdapterTensors(group.method, None, None)
        _register(shared, declared.shared, adapter_dtype(first.dtype, dtype), first.device)
        root = adapted._modules.setdefault(SHARED, Container())
        assert root is not None
        if index == 0:
            root._modules[name] = shared
        else:
            root._modules.setdefault(name, Container())._modules[f"group{index}"] = shared  # type: ignore[union-attr]
    local, local_holders = [], []
    for site, decls in zip(group.sites, declared.local, strict=True):
        tensors = AdapterTensors(group.method, site, shared)
        _register(tensors, decls, adapter_dtype(site.dtype, dtype), site.device)
        add_adapter(modules[site.owner], name, tensors, site.key)
        local_holders.append(tensors)
        local.append(tensors.tensors())
    if any(site.device.type == "meta" for site in group.sites):
        for holder in (*local_holders, *([shared] if shared is not None else [])):
            missing_values.note(holder, holder.tensors())  # shapes only
        return
    common = shared.tensors() if shared is not None else {}
    with torch.no_grad():
        stacked_matrices.derive(group.method, group.sites, common, local)
        if initialise:
            sites = group.sites
            weights = OneByOne(len(sites), lambda i: full(weight_at(modules, sites[i]).detach()).to(sites[i].device))
            stacked_matrices.initialise(group.method, sites, common, local, weights, update)
    for holder, site, decls in zip(local_holders, group.sites, declared.local, strict=True):
        if (weight := on_mesh(modules, site)) is not None:
            place(holder, group.method, site, weight, decls)
            if shared is not None and not any(map(is_sharded, common.values())):
                replicate(shared, weight)
                common = shared.tensors()


def _train_parameters(modules: Mapping[str, nn.Module], names: Sequence[str], adapter: str, keep_ties: bool) -> None:
    """Give the owners of single parameters copies to train, which stand for them while the adapter is active."""
    first: dict[tuple[object, ...], nn.Parameter] = {}
    holders: dict[str, TrainedParameters] = {}
    for whole in names:
        path, _, attribute = whole.rpartition(".")
        own = modules[path]._parameters[attribute]
        assert own is not None
        copied = first.get(storage_key(own)) if keep_ties else None
        if copied is None:
            copied = nn.Parameter(own.detach().clone())
            first[storage_key(own)] = copied
        holder = holders.setdefault(path, TrainedParameters())
        holder.register_parameter(attribute, copied)
    for path, holder in holders.items():
        add_adapter(modules[path], adapter, holder, PARAMETERS)
        for attribute in holder._parameters:
            tie(modules[path], adapter, attribute, holder, attribute)


def _trainable_copies(modules: Mapping[str, nn.Module], paths: Sequence[str], keep_ties: bool) -> dict[str, nn.Module]:
    """Copies with tensors of their own, from the base values; what is tied among them stays tied if ties are kept."""
    memo: dict[int, Any] = {}
    first: dict[tuple[object, ...], nn.Parameter] = {}
    copies = {}
    for path in paths:
        if not keep_ties:
            memo, first = {}, {}
        module = plain_view(modules[path])  # another adapter may train it too: start from the base, not from that one
        for _, parameter in base_parameters(module):
            same = first.setdefault(storage_key(parameter), parameter)
            if same is not parameter:  # two parameters over one memory
                memo[id(parameter)] = memo[id(same)] if id(same) in memo else copy.deepcopy(same, memo)
        memo.update({id(store): store for store in shared_stores(module)})
        copies[path] = twin = loaded(copy.deepcopy(module, memo))
        for inner in twin.modules():  # adapters inside it stay where they are
            if BASE in inner.__dict__:
                inner._modules.pop(ADAPTERS, None)
                restore_class(inner)
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    return copies
