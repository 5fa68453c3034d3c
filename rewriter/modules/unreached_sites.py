"""The net under what analysis cannot see: the first forward of an adapted model is watched.

    a base weight is read, the adapter at it is not  ->  AdapterError: a parent reads `child.weight`, a forward was
                                                         bound or captured before rewrite
    neither is read                                  ->  a warning: routed experts, one encoder of two, dropped layers

What is read is told by memory: a mode sees the arguments of every operator. It is there for the first forward of the
root that completes, and for the first one after `set_active` has brought an adapter that no forward has proved yet;
afterwards the hooks are gone. A compiled graph is judged by its inputs (`check_graph`) before it runs.

Does not see: weights that are no plain tensors (quantised, sharded), forwards of a part of the model, and what parts
of the model do that are compiled on their own.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapter_tensors import ADAPTERS, adapter_child, parameter_holder
from ..analysis.dataflow import tied_names
from ..calls.disabled import nothing
from ..capture.captured import captured
from ..errors import AdapterError, listing
from ..graft import site_tensors
from ..state import STATE, AdapterRecord, ModelState, grafted_modules
from .base_reads import Place, PlaceMemory, Reads
from .compiled_parts import compiled_parts

HOOK = "fxgraft"  # key of the hooks on a root


# -- what to watch -----------------------------------------------------------------------------------------------
def _plain(tensors: Iterable[Any]) -> list[Tensor]:
    """Those with memory of their own that can be told."""
    return [t for t in tensors if type(t) in (Tensor, nn.Parameter) and not t.is_meta and t.numel() and _dense(t)]


def _dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor.data) is Tensor


def _places(root: nn.Module, state: ModelState, names: Iterable[str]) -> list[Place]:
    modules = grafted_modules(root)
    ties = tied_names(root)
    embeddings = {path for path, module in modules.items() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    found: list[Place] = []
    for name in names:
        record = state.adapters[name]
        asks = {group.method for group in record.groups if group.method.inputs}  # told per call: maybe the base's
        for path in dict.fromkeys(site.owner for site in record.sites):
            for tensors in site_tensors(modules[path], name):
                site = tensors.site
                if site is None or tensors.method in asks:
                    continue
                full = f"{path}.{site.weight}".lstrip(".")
                others = {other.rpartition(".")[0] for other in ties.get(full, ())} - {path}
                base = _plain([modules[path]._parameters.get(site.weight)])
                own = _plain(tensors.tensors().values())
                if base and own and others <= embeddings:
                    found.append(Place(site.name, name, id(modules[path]), base, own, looked_up=bool(others)))
        followed = {tie.full for tie in record.ties}
        for path in record.train if state.weights.get(name, 1) == 1 else ():
            copied = adapter_child(modules[path], name)
            assert copied is not None
            base = []
            for n, parameter in modules[path].named_parameters():
                within = {f"{path}.{n}", *followed}
                if f".{ADAPTERS}." not in f".{n}" and ties.get(f"{path}.{n}", within) <= within:
                    base += _plain([parameter])
            own = _plain(copied.parameters())
            if base and own:
                found.append(Place(path, name, id(modules[path]), base, own, trained=True))
        found += _single(name, record, modules, ties)
    return found


def _single(
    name: str, record: AdapterRecord, modules: Mapping[str, nn.Module], ties: Mapping[str, frozenset[str]]
) -> list[Place]:
    """The places of single parameters that an adapter trains, and all that is tied to them."""
    found = []
    for full in record.parameters:
        path, _, attribute = full.rpartition(".")
        held = parameter_holder(modules[path], name)
        assert held is not None
        base, own = _plain([modules[path]._parameters[attribute]]), _plain([held._parameters[attribute]])
        if base and own and ties.get(full, frozenset()) <= {*record.parameters}:
            found.append(Place(full, name, id(modules[path]), base, own, trained=True))
    return found


# -- judging -----------------------------------------------------------------------------------------------------
def _judge(places: Iterable[Place]) -> None:
    for place in places:
        if "base" in place.read and not place.compiled and (place.trained or "adapted" not in place.read):
            what = "trained in full" if place.trained else "a site"
            raise AdapterError(
                f"the forward reads the base's values of {place.name!r} (in {place.by}), which is {what} of adapter "
                f"{place.adapter!r}, and not the adapter's: a parent takes the weight without calling the module, or "
                "calls a forward that was bound or captured before rewrite. The adapter would have no effect there, "
                "and merging it would give another model. Leave it out of targets and train, or let the parent call "
                "the module"
            )
    idle: dict[str, list[str]] = {}
    for place in places:
        if not place.read:
            idle.setdefault(place.adapter, []).append(place.name)
    for adapter, names in idle.items():
        total = sum(place.adapter == adapter for place in places)
        warnings.warn(
            f"adapter {adapter!r}: the first forward did not reach {len(names)} of {total} places "
            f"({listing(names, 4)}). The base's weights took no part there either, so the result is right, and these "
            "got no gradient. That is usual for routed experts, dropped layers and models called in part; else leave "
            "them out of targets",
            stacklevel=2,
        )


@dataclass
class _Run:
    root: nn.Module
    names: tuple[str, ...]
    places: list[Place]
    mode: Reads
    frame: Any  # of `_call_impl`, which calls the hooks from an inner function or, after an error, itself
    thread: int

    def over(self) -> bool:
        """Whether the call was left without `_after`: an interrupt, as from the keyboard."""
        frame = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back  # type: ignore[assignment]
        return frame is None

    def end(self) -> None:
        global _run
        _run = None
        self.mode.__exit__(None, None, None)


_run: _Run | None = None  # one at a time in the process: torch keeps some flags of its modes for all threads
_lock = threading.Lock()


def _before(root: nn.Module, args: Any) -> None:
    global _run
    if captured():
        return
    state: ModelState | None = root.__dict__.get(STATE)
    if state is None or torch.jit.is_tracing() or getattr(root, "_is_replica", False):
        return
    with _lock:
        if _run is not None and _run.thread == threading.get_ident() and _run.over():
            _run.end()
        keys = nothing.keys
        off = keys is not nothing and state.switch.key in keys
        names = tuple(name for name in state.active if name not in state.proved)
        if _run is not None or off or not names or torch._C._len_torch_dispatch_stack():
            return
        compiled = _compiled_parts(root)
        places = [place for place in _places(root, state, names) if place.owner not in compiled]
        _run = _Run(root, names, places, Reads(PlaceMemory(places)), sys._getframe(2), threading.get_ident())
        _run.mode.__enter__()


def _compiled_parts(root: nn.Module) -> set[int]:
    """The modules inside those that are compiled on their own: what compiled code reads shows in its graph alone."""
    return {id(part) for module in compiled_parts(root) for part in module.modules()}


def _after(root: nn.Module, args: Any, output: Any) -> None:
    if captured():
        return
    run, caller = _run, sys._getframe(1)
    if run is None or run.frame not in (caller, caller.f_back):  # of another call, in another thread maybe
        return
    with _lock:
        run.end()
    state: ModelState | None = root.__dict__.get(STATE)
    if output is None or state is None:  # the forward raised
        return
    _judge(run.places)
    state.proved |= {name for name in run.names if name in state.adapters}
    watch(root, state)


def watch(root: nn.Module, state: ModelState | None) -> None:
    """Watch the next forward if an adapter is active that none has proved; else take the hooks away."""
    wanted = state is not None and any(name not in state.proved for name in state.active)
    hooks: tuple[tuple[Any, Any], ...] = (
        (root._forward_pre_hooks, _before),
        (root._forward_hooks, _after),
        (root._forward_hooks_always_called, True),
    )
    for registered, hook in hooks:
        if wanted:
            registered[HOOK] = hook
        else:
            registered.pop(HOOK, None)


# -- compiled graphs ---------------------------------------------------------------------------------------------
def check_graph(root: nn.Module, graph: fx.Graph, inputs: Mapping[fx.Node, Tensor]) -> AdapterError | None:
    """Why a graph of this model must not run: it reads a base weight and not its adapter. None where all is well."""
    state: ModelState | None = root.__dict__.get(STATE)
    keys = nothing.keys
    if state is None or (keys is not nothing and state.switch.key in keys):
        return None
    places = _places(root, state, [name for name in state.active if name not in state.proved])
    memory = PlaceMemory(places)
    for node, tensor in inputs.items():
        for user in node.users:
            name = getattr(user.target, "__name__", str(user.target))
            memory.read(tensor, name)
    try:
        _judge([place for place in places if place.read])
    except AdapterError as error:
        return error
    return None
