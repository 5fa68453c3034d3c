"""The verbs: rewrite, switch, swap, remove. Everything is checked first; a call that raises has changed nothing."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .active_together import check_together, chosen_weights
from .adapter_state import AdapterState, check_same_function, methods_of
from .analysis.dataflow import storage_key
from .calls.disabled import turned_off
from .calls.forward_inputs import GUARD, release_inputs, take_inputs
from .capture.parent_reads import rebind_forwards
from .capture.skeleton import copy_skeleton
from .errors import AdapterError, SpecError, listing, near_misses
from .graft import (
    ADAPTERS,
    BASE,
    HOSTED,
    add_adapter,
    check_forward,
    drop_adapter,
    host,
    plain_view,
    planned,
    restore_class,
    site_tensors,
    tie,
)
from .graft_plan import Plan, Shape, declare, plan
from .method import Decl, Declaration, InitContext, Method
from .modules import pending
from .modules.bias_slot import bias_slot
from .modules.fast_paths import set_fast_paths
from .modules.foreign_tuners import check_no_tuners
from .modules.reach import watch
from .modules.save_hook import release_saving, take_over_saving
from .modules.shards import check_unsharded, full, put, reshard
from .sites import Site
from .spec import Spec
from .state import (
    SHARED,
    STATE,
    TIED,
    AdapterRecord,
    AdapterTensors,
    Container,
    Group,
    M,
    ModelState,
    base_modules,
    base_parameters,
    find_state,
    forget_lost,
    grafted_modules,
    record_of,
    state_of,
    unwrap,
)
from .targets import Resolution, check_name, resolve, warn_untied

T = TypeVar("T")
_switching = threading.RLock()
_NARROW = (torch.float16, torch.bfloat16)


# -- rewrite -----------------------------------------------------------------------------------------------------
def rewrite(model: T, spec: Spec, name: str = "default", *, dtype: torch.dtype | None = None, update: Any = None) -> T:
    """Graft an adapter into a model and return the adapted model; the input is not changed.

    The result is of the model's own class, shares the base weights' memory, keeps every base state-dict key and adds
    `<owner>.fxgraft.<name>.<tensor>` beside them. The new adapter is the active one. Only its tensors and the modules
    of `spec.train` require grad; these modules are copied, so that training leaves the input model alone.

    Args:
        model: an `nn.Module` (adapted already or not), `fx.GraphModule` or `torch.export.ExportedProgram`.
        spec: what to graft, and where.
        name: of the adapter; letters, digits, `_` and `-`.
        dtype: of the adapter's tensors; by default the site's weight dtype, or float32 where that is narrower than
            float32 or not a floating type.
        update: the result of `estimate_update`, for methods that start from one (LoRA-SB).

    Raises:
        TargetError: a pattern matches nothing, or something that cannot be adapted.
        SpecError: the method does not fit the sites.
        AdapterError: the name is taken or not allowed.
    """
    if not isinstance(spec, Spec):
        raise AdapterError(f"rewrite(model, {type(spec).__name__}): the second argument is an fg.Spec(method, targets)")
    if isinstance(model, torch.export.ExportedProgram):
        from .exported_program import rewrite_exported

        return rewrite_exported(model, spec, name, dtype=dtype, update=update)  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"rewrite({type(model).__name__}, ...): give an nn.Module, an fx.GraphModule or an ExportedProgram"
        )
    warn_untied(unwrap(model), spec)
    return graft_adapter(model, spec, name, dtype=dtype, update=update)  # type: ignore[return-value]


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
) -> M:
    """`rewrite` for modules.

    Args:
        initialise: False leaves the trainable and frozen tensors for a load to fill.
        order: names of sites in the order they count in, where that is not the order of the model's modules: an
            exported module may list its submodules otherwise, and methods with one projection for all sites
            (Uni-LoRA) hand it out in order.
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
    resolution = resolve(source, spec)
    groups = _group(resolution, order)
    declared = declare(groups)
    if check is not None:
        check(plan(groups, declared, resolution.train, dict(base_modules(source))))
    adapted = copy_skeleton(source)
    state = adapted.__dict__.setdefault(STATE, ModelState())
    if not state.adapters:
        state.trained = frozenset(n for n, p in base_parameters(source) if p.requires_grad)
    modules = grafted_modules(adapted)
    for group in groups:
        for site in group.sites:
            if site.host is not None and group.method.inputs:
                raise SpecError(
                    f"{site.name!r}: its product is in the forward of {site.host or 'the root'!r}, which never calls "
                    "it, so a bank cannot tell which rows are whose there"
                )
            without = site.host is not None or bias_slot(modules[site.owner], site) is None
            if site.bias is None and group.method.adds_bias(site) and without:
                raise SpecError(
                    f"{type(group.method).__name__} gives {site.name!r} a bias, and the owner's forward adds none to "
                    "this product: it could never be merged. Exclude the site, or choose a method without a bias there "
                    "(GLoRA: a path with C, D and E 'none')"
                )
    for index, (group, tensors) in enumerate(zip(groups, declared, strict=True)):
        _create(adapted, modules, group, tensors, index, name, dtype, update, initialise)
    for site in (site for group in groups for site in group.sites if site.host is not None):
        host(modules[site.computed], name, site.within)
    copies = _trainable_copies(modules, resolution.train, spec.keep_ties)
    for path, twin in copies.items():
        add_adapter(modules[path], name, twin)
    for tied in resolution.ties:
        tie(modules[tied.path], name, tied.attribute, copies[tied.trained], tied.name)
    state.adapters[name] = AdapterRecord(spec, groups, resolution.train, ties=resolution.ties)
    set_active(adapted, [name])
    rebind_forwards(adapted, (modules[path] for path in _owners(state.adapters[name])))
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
            pending.note(holder, holder.tensors())  # shapes only
        return
    common = shared.tensors() if shared is not None else {}
    with torch.no_grad():
        group.method.derive(group.sites, common, local)
        if initialise:
            weights = [s.linear_layout(modules[s.owner]._parameters[s.weight].detach()) for s in group.sites]  # type: ignore[union-attr]
            group.method.initialise(group.sites, common, local, InitContext(weights, update))


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
        copies[path] = twin = copy.deepcopy(module, memo)
        for inner in twin.modules():  # adapters inside it stay where they are
            if BASE in inner.__dict__:
                inner._modules.pop(ADAPTERS, None)
                restore_class(inner)
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    return copies


# -- switching ---------------------------------------------------------------------------------------------------
def active(model: nn.Module) -> list[str]:
    """Names of the active adapters, in the order they are added to the base's output."""
    return list(state_of(model).active)


def active_weights(model: nn.Module) -> dict[str, float]:
    """The active adapters and the weights of their deltas, in order."""
    state = state_of(model)
    return {name: state.weights.get(name, 1.0) for name in state.active}


def set_active(
    model: nn.Module,
    names: Sequence[str] | Mapping[str, float],
    weights: Sequence[float] | Mapping[str, float] | None = None,
) -> None:
    """Make exactly these adapters active, in this order; an empty list leaves the base model.

    Deltas of several active adapters add up, each times its weight. Only tensors of active adapters require grad; those
    you froze yourself stay frozen when their adapter comes back. A compiled model is not compiled anew for an adapter
    of the same structure as one it has run before, nor for another weight (1 aside).

    It changes the model for every thread: a call going on in another thread meanwhile may see some layers switched and
    some not. For one thread or task alone there is `disabled`.

    Args:
        names: the adapters, or adapters with their weights: `{"a": 0.7, "b": -0.2}`.
        weights: of the names, in order or by name; by default 1. Of an adapter that trains modules in full a weight
            goes between the base's module and its own, which only linears and embeddings allow.

    Raises:
        AdapterError: an unknown name, a weight that is 0 or not finite, or adapters that exclude each other; nothing
            has been changed then.
    """
    root, state = unwrap(model), state_of(model)
    chosen = chosen_weights(state, names, weights, "set_active")
    check_together(root, state, chosen)
    _apply_active(root, state, chosen)


def _apply_active(root: nn.Module, state: ModelState, weights: Mapping[str, float]) -> None:
    modules = grafted_modules(root)
    with _switching:
        owners = dict.fromkeys(p for record in state.adapters.values() for p in _owners(record))
        for path in owners:
            check_forward(modules[path], path)
        changes = [planned(modules[path], weights, state.switch) for path in owners]
        # All that can fail is done: from here on the model changes.
        release_inputs(root)
        for change in changes:
            change.make()
        for name, record in state.adapters.items():
            if (name in state.active) != (name in weights):
                parameters = adapter_parameters(root, name, record, modules)
                _switch_gradients(state, name, parameters, name in weights)
        set_fast_paths(modules, [path for name in weights for path in _owners(state.adapters[name])], state.switch)
        take_inputs(root, (wanted for n in weights for g in state.adapters[n].groups for wanted in g.method.inputs))
        state.active = tuple(weights)
        state.weights = {name: weight for name, weight in weights.items() if weight != 1}
        watch(root, state)


def _switch_gradients(state: ModelState, name: str, parameters: Mapping[str, nn.Parameter], on: bool) -> None:
    """Let an adapter's parameters require grad, or none of them; what the user froze before stays frozen."""
    if not on:
        state.frozen[name] = frozenset(key for key, p in parameters.items() if not p.requires_grad)
    kept = state.frozen.pop(name, frozenset()) if on else frozenset()
    for key, parameter in parameters.items():
        if not on or key not in kept:
            parameter.requires_grad_(on and parameter.is_floating_point())


def _owners(record: AdapterRecord) -> Iterator[str]:
    yield from dict.fromkeys(path for site in record.sites for path in (site.owner, site.computed))
    yield from record.train
    yield from dict.fromkeys(tied.path for tied in record.ties)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is exactly the base model, trained heads included, for this thread or task alone.

    Nothing is changed on the model: other threads meanwhile get the adapted model, and so do threads started inside
    the block (unless run in a copy of its context, as `asyncio.to_thread` does). Blocks may be nested. A compiled model
    is compiled once more, for the base. Activation checkpointing computes again what the forward pass saw.

    Raises:
        AdapterError: the model has no adapter; it is a `DataParallel`, which runs threads of its own; or a backward
            pass inside the block computes checkpointed layers again whose forward pass was outside.
    """
    if isinstance(model, nn.DataParallel):
        raise AdapterError(
            "disabled(DataParallel): its replicas run in threads of their own, which the block does not reach; use "
            "DistributedDataParallel, or set_active(model, [])"
        )
    with turned_off(state_of(model).switch):
        yield


# -- tensors -----------------------------------------------------------------------------------------------------
def _shared_of(root: nn.Module, name: str) -> dict[str, AdapterTensors]:
    """Shared tensors of an adapter, by group: the key is empty for the first."""
    container = root._modules.get(SHARED)
    child = container._modules.get(name) if container is not None else None
    if child is None:
        return {}
    found = {"": child} if isinstance(child, AdapterTensors) else {}
    found.update({k: m for k, m in child._modules.items() if isinstance(m, AdapterTensors)})  # type: ignore[misc]
    return found  # type: ignore[return-value]


def adapter_modules(
    root: nn.Module, name: str, record: AdapterRecord, modules: Mapping[str, nn.Module] | None = None
) -> Iterator[tuple[str, AdapterTensors]]:
    """`(prefix, tensors)` of one adapter: shared ones first, then sites. Prefixes end with a dot or are empty."""
    modules = grafted_modules(root) if modules is None else modules
    for key, shared in _shared_of(root, name).items():
        yield (f"{key}." if key else ""), shared
    position = {site.name: i for i, site in enumerate(record.sites)}
    for owner in dict.fromkeys(site.owner for site in record.sites):
        for tensors in sorted(site_tensors(modules[owner], name), key=lambda t: position[t.site.name]):  # type: ignore[union-attr]
            yield f"{tensors.site.name}.".lstrip("."), tensors  # type: ignore[union-attr]


def trained_modules(
    root: nn.Module, name: str, record: AdapterRecord, modules: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The adapter's own copies of the modules it trains, by path."""
    modules = grafted_modules(root) if modules is None else modules
    return {path: modules[path]._modules[ADAPTERS]._modules[name] for path in record.train}  # type: ignore[union-attr, misc, index]


def adapter_parameters(
    root: nn.Module, name: str, record: AdapterRecord, modules: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Parameter]:
    """The trainable tensors of one adapter, trained modules included, by their names in the adapter's state."""
    found: dict[str, nn.Parameter] = {}
    for prefix, tensors in adapter_modules(root, name, record, modules):
        found.update({prefix + n: p for n, p in tensors._parameters.items() if p is not None})
    for path, module in trained_modules(root, name, record, modules).items():
        found.update({f"{path}.{n}": p for n, p in module.named_parameters()})
    return found


def _live_state(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors themselves: trainable, frozen and the trained modules' whole state; nothing derived."""
    reshard(root)
    record = record_of(root, name)
    modules = grafted_modules(root)
    found: dict[str, Tensor] = {}
    for prefix, tensors in adapter_modules(root, name, record, modules):
        saved = {n: t for n, t in tensors.tensors().items() if n not in tensors._non_persistent_buffers_set}
        found.update({prefix + n: t for n, t in saved.items()})
    for path, module in trained_modules(root, name, record, modules).items():
        found.update({f"{path}.{n}": t for n, t in module.state_dict(keep_vars=True).items()})
    return found


def adapter_state(model: nn.Module, name: str = "default") -> AdapterState:
    """What makes up an adapter, detached, not copied: `<site>.<tensor>`, shared tensors by their bare name, and
    the trained modules under their base keys. Derived tensors (Uni-LoRA's indices) are not part of it.

    The dict remembers the methods it was taken from (`AdapterState.methods`). Of a model that FSDP2 has sharded every
    process gets whole tensors, and every process has to call this.
    """
    root = unwrap(model)
    tensors = {key: full(tensor.detach()) for key, tensor in _live_state(root, name).items()}
    return AdapterState(tensors, methods_of(record_of(root, name)))


def state_from(model: nn.Module, name: str) -> AdapterState:
    """The state of a model's adapter of that name, or of its only one."""
    adapters = list(state_of(model).adapters)
    if name not in adapters and len(adapters) > 1:
        raise AdapterError(f"the model to take {name!r} from has {listing(adapters)}: give its adapter_state")
    return adapter_state(model, name if name in adapters else adapters[0])


def check_shapes(expected: Mapping[str, Shape], given: Mapping[str, Tensor], what: str) -> None:
    """Raise `AdapterError` unless `given` has dense tensors of exactly these names and shapes."""
    if missing := [k for k in expected if k not in given]:
        raise AdapterError(f"{what} lacks {len(missing)} tensor(s): {listing(missing)}")
    if unknown := [k for k in given if k not in expected]:
        close = near_misses(str(unknown[0]), expected, 2)
        raise AdapterError(
            f"{what} has {len(unknown)} tensor(s) this adapter does not have: {listing(unknown)}"
            + (f"; close are {listing(close)}" if close else "")
        )
    for key, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            kind = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise AdapterError(f"{what}: {key!r} is {kind}, not a dense tensor with values")
        if 0 in (tensor.numel(), math.prod(expected[key])):
            raise AdapterError(f"{what}: {key!r} is of size 0 there or here: a shard (ZeRO-3)? Gather it first")
        if tuple(tensor.shape) != tuple(expected[key]):
            raise AdapterError(f"{what}: {key!r} is {tuple(tensor.shape)}, the model's is {tuple(expected[key])}")


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise `AdapterError` unless `given` has exactly the names, shapes and dtypes of `expected`, all finite."""
    check_shapes({key: tuple(slot.shape) for key, slot in expected.items()}, given, what)
    for key, tensor in given.items():
        slot = expected[key]
        if tensor.dtype != slot.dtype:
            raise AdapterError(
                f"{what}: {key!r} is {tensor.dtype}, the model's is {slot.dtype}; cast it first "
                f"(tensor.to({slot.dtype})) or rewrite with dtype={tensor.dtype}"
            )
    if bad := [k for k, t in given.items() if not torch.isfinite(t).all()]:
        raise AdapterError(f"{what} has NaN or infinite values in {listing(bad)}")


def write_state(root: nn.Module, name: str, given: Mapping[str, Tensor]) -> None:
    """Copy checked values into an adapter's tensors, in place. What is tied can take one value only."""
    live = _live_state(root, name)
    first: dict[int, str] = {}
    for key, slot in live.items():
        other = first.setdefault(id(slot), key)
        if other != key and not torch.equal(given[other], given[key]):
            raise AdapterError(f"{key!r} and {other!r} are one tensor in this model, and are given different values")
    with torch.no_grad():
        for key, slot in live.items():
            put(slot, given[key])
    for _, tensors in adapter_modules(root, name, record_of(root, name)):
        pending.settle(tensors)


def swap(model: nn.Module, state: Mapping[str, Tensor] | nn.Module, name: str = "default") -> None:
    """Give an adapter other values of the same structure, in place; a compiled model is not compiled anew.

    A call going on in another thread meanwhile may see some tensors new and some old: swap between calls.

    Args:
        state: what `adapter_state` gives, which remembers its methods; a plain dict, taken as values of this adapter's
            structure; or an adapted model with an adapter of that name, or one adapter.

    Raises:
        AdapterError: a tensor is missing, unknown, of another shape or dtype, or not finite; or the state's method
            would compute something else (another alpha, seed, ...). Nothing has been written then.
    """
    root, record = unwrap(model), record_of(model, name)
    what = f"the state for adapter {name!r}"
    if isinstance(state, nn.Module):
        state = state_from(state, name)
    if not isinstance(state, Mapping):
        raise AdapterError(f"{what} is a {type(state).__name__}; give adapter_state(...) or a model")
    check_same_function(methods_of(record), state, what)
    state = {key: full(t) if isinstance(t, Tensor) else t for key, t in state.items()}
    check_state(_live_state(root, name), state, what)
    write_state(root, name, state)


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out of the model, in place. Without adapters the model is the plain base, frozen flags undone."""
    root, state = unwrap(model), state_of(model)
    record = forget_lost(root, name)
    _apply_active(root, state, {n: w for n, w in active_weights(root).items() if n != name})
    modules = grafted_modules(root)
    if any(group.method.inputs for group in record.groups):
        root.__dict__.pop(GUARD, None)
    for path in _owners(record):
        drop_adapter(modules[path], name)
        if ADAPTERS not in modules[path]._modules and modules[path].__dict__.keys().isdisjoint((TIED, HOSTED)):
            restore_class(modules[path])
    container = root._modules.get(SHARED)
    if container is not None:
        container._modules.pop(name, None)
        if not container._modules:
            del root._modules[SHARED]
    del state.adapters[name]
    state.proved.discard(name)
    watch(root, state)
    state.frozen.pop(name, None)
    if not state.adapters:
        del root.__dict__[STATE]
        release_saving(root)
        for n, parameter in base_parameters(root):
            parameter.requires_grad_(n in state.trained)


def base_of(model: M) -> M:
    """The plain base model: a new skeleton of the original module types over the same base tensors."""
    root = copy_skeleton(unwrap(model))
    state = find_state(root)
    for name in list(state.adapters) if state else []:
        remove(root, name)
    return root
