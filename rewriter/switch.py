"""Which adapters are active, and taking adapters out. All or nothing: a call that raises has changed nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from .active_adapters import check_together, chosen_weights
from .adapter_tensors import ADAPTERS, SHARED, TIED
from .base_names import base_parameters
from .calls.disabled import turned_off
from .calls.forward_inputs import GUARD, release_inputs, take_inputs
from .capture.skeleton import copy_skeleton
from .errors import AdapterError
from .graft import check_forward, drop_adapter, planned
from .grafted_class import HOSTED, restore_class
from .modules.compiled_parts import tell_from_compiled
from .modules.fast_paths import set_fast_paths
from .modules.quantised_sites import release_quantised
from .modules.save_hook import release_saving
from .modules.unreached_sites import watch
from .modules.wrappers import M, unwrap
from .program_verbs import changing_programs, over_programs
from .state import STATE, ModelState, find_state, forget_lost, grafted_modules, state_of
from .tensors import adapter_parameters

_switching = threading.RLock()


@over_programs
def active(model: nn.Module) -> list[str]:
    """Names of the active adapters, in the order they are added to the base's output."""
    return list(state_of(model).active)


@over_programs
def active_weights(model: nn.Module) -> dict[str, float]:
    """The active adapters and the weights of their deltas, in order."""
    state = state_of(model)
    return {name: state.weights.get(name, 1.0) for name in state.active}


@changing_programs
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
        owners = dict.fromkeys(p for record in state.adapters.values() for p in record.owners)
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
        set_fast_paths(modules, [path for name in weights for path in state.adapters[name].owners], state.switch)
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
    if isinstance(model, torch.export.ExportedProgram):
        raise AdapterError(
            "disabled(ExportedProgram): the graph of a program is fixed, and no block can change what it computes; use "
            "fg.set_active(program, []), or rewrite program.module() instead of the program"
        )
    if isinstance(model, nn.DataParallel):
        raise AdapterError(
            "disabled(DataParallel): its replicas run in threads of their own, which the block does not reach; use "
            "DistributedDataParallel, or set_active(model, [])"
        )
    state = state_of(model)
    if torch.is_grad_enabled():
        tell_from_compiled(model)
    with turned_off(state.switch):
        yield


@changing_programs
def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out of the model, in place. Without adapters the model is the plain base, frozen flags undone."""
    root, state = unwrap(model), state_of(model)
    record = forget_lost(root, name)
    _apply_active(root, state, {n: w for n, w in active_weights(root).items() if n != name})
    modules = grafted_modules(root)
    if any(group.method.inputs for group in record.groups):
        root.__dict__.pop(GUARD, None)
    for path in record.owners:
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
        release_quantised(modules)
        for n, parameter in base_parameters(root):
            parameter.requires_grad_(n in state.trained)


def base_of(model: M) -> M:
    """The plain base model: a new skeleton of the original module types over the same base tensors."""
    root = copy_skeleton(unwrap(model))
    state = find_state(root)
    for name in list(state.adapters) if state else []:
        remove(root, name)
    return root
