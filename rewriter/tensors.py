"""The tensors of an adapter: which there are, their values, and other values for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .adapter_state import AdapterState, check_same_function, methods_of
from .adapter_tensors import SHARED, AdapterTensors, adapter_child, parameter_holder
from .errors import AdapterError, listing, near_misses
from .graft import site_tensors
from .graft_plan import Shape
from .modules import missing_values
from .modules.shards import full, put, reshard
from .modules.wrappers import unwrap
from .program_verbs import over_programs
from .state import AdapterRecord, grafted_modules, record_of, state_of


def _shared_of(root: nn.Module, name: str) -> dict[str, AdapterTensors]:
    """Shared tensors of an adapter, by group: the key is empty for the first."""
    container = root._modules.get(SHARED)
    child = container._modules.get(name) if container is not None else None
    if child is None:
        return {}
    places = {"": child, **child._modules}
    return {key: held for key, held in places.items() if isinstance(held, AdapterTensors)}


def adapter_modules(
    root: nn.Module, name: str, record: AdapterRecord, modules: Mapping[str, nn.Module] | None = None
) -> Iterator[tuple[str, AdapterTensors]]:
    """`(prefix, tensors)` of one adapter: shared ones first, then sites. Prefixes end with a dot or are empty."""
    modules = grafted_modules(root) if modules is None else modules
    for key, shared in _shared_of(root, name).items():
        yield (f"{key}." if key else ""), shared
    owners = dict.fromkeys(site.owner for site in record.sites)
    at = {t.site.name: t for owner in owners for t in site_tensors(modules[owner], name) if t.site is not None}
    for owner in owners:
        for site in (site for site in record.sites if site.owner == owner):
            yield f"{site.name}.".lstrip("."), at[site.name]


def trained_modules(
    root: nn.Module, name: str, record: AdapterRecord, modules: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The adapter's own copies of the modules it trains, by path; of a module of which it trains single parameters, a
    module with these alone."""
    modules = grafted_modules(root) if modules is None else modules
    copies = {path: adapter_child(modules[path], name) for path in record.train}
    copies |= {path: parameter_holder(modules[path], name) for path in record.holders}
    return {path: copy for path, copy in copies.items() if copy is not None}


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


def live_state(root: nn.Module, name: str) -> dict[str, Tensor]:
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


@over_programs
def adapter_state(model: nn.Module, name: str = "default") -> AdapterState:
    """What makes up an adapter, detached, not copied: `<site>.<tensor>`, shared tensors by their bare name, and
    the trained modules under their base keys. Derived tensors (Uni-LoRA's indices) are not part of it.

    The dict remembers the methods it was taken from (`AdapterState.methods`). Of a model that FSDP2 has sharded every
    process gets whole tensors, and every process has to call this.
    """
    root = unwrap(model)
    tensors = {key: full(tensor.detach()) for key, tensor in live_state(root, name).items()}
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


def widened_like(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values in the dtypes they shall have where that loses nothing; the others as they are."""
    return {
        key: tensor.to(expected[key].dtype)
        if key in expected and torch.promote_types(tensor.dtype, expected[key].dtype) == expected[key].dtype
        else tensor
        for key, tensor in given.items()
    }


def write_state(root: nn.Module, name: str, given: Mapping[str, Tensor]) -> None:
    """Copy checked values into an adapter's tensors, in place. What is tied can take one value only."""
    live = live_state(root, name)
    first: dict[int, str] = {}
    for key, slot in live.items():
        other = first.setdefault(id(slot), key)
        if other != key and not torch.equal(given[other], given[key]):
            raise AdapterError(f"{key!r} and {other!r} are one tensor in this model, and are given different values")
    with torch.no_grad():
        for key, slot in live.items():
            put(slot, given[key])
    for _, tensors in adapter_modules(root, name, record_of(root, name)):
        missing_values.settle(tensors)


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
    check_state(live_state(root, name), state, what)
    write_state(root, name, state)
