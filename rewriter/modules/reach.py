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

import bisect
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..analysis.dataflow import tied_names
from ..calls.disabled import nothing
from ..capture.watched import captured
from ..errors import AdapterError, listing
from ..graft import site_tensors
from ..state import ADAPTERS, STATE, ModelState, grafted_modules
from .compiled_parts import compiled_parts

HOOK = "fxgraft"  # key of the hooks on a root
_METADATA = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
#: what every call of compiled code goes through; its module is only imported when something is compiled
_COMPILED = (os.path.join(os.path.dirname(torch.__file__), "_dynamo", "eval_frame.py"), "compile_wrapper")
_LOOKUPS = ("embedding", "embedding_bag", "_embedding_bag", "embedding_renorm_")


@dataclass
class _Place:
    """A site or a trained module: the memory of the base's tensors, and of what is read with or instead of them."""

    name: str
    adapter: str
    owner: int  # id of the module
    base: list[Tensor]
    adapted: list[Tensor]
    trained: bool = False
    looked_up: bool = False  # tied to an embedding, which may read the base's values
    read: set[str] = field(default_factory=set)
    by: str = ""
    compiled: bool = False  # read by compiled code, of which the mode sees some operators and not others


class _Memory:
    """Which places a tensor's memory belongs to."""

    def __init__(self, places: Iterable[_Place]) -> None:
        self._at: dict[int, tuple[int, list[tuple[_Place, str]]]] = {}
        for place in places:
            for what, tensors in (("base", place.base), ("adapted", place.adapted)):
                for tensor in tensors:
                    start = tensor.data_ptr()
                    end, found = self._at.get(start, (0, []))
                    self._at[start] = max(end, start + tensor.nbytes), [*found, (place, what)]
        self._starts = sorted(self._at)

    def read(self, tensor: Tensor, by: str) -> list[_Place]:
        """Note that an operator takes this tensor; the places whose base it reads."""
        try:
            pointer = tensor.data_ptr()
        except RuntimeError:  # a tensor without memory, of a functional or fake kind
            return []
        index = bisect.bisect_right(self._starts, pointer) - 1
        if index < 0:
            return []
        end, found = self._at[self._starts[index]]
        based = []
        for place, what in found if pointer < end else ():
            if what == "base" and place.looked_up and by in _LOOKUPS:
                continue
            place.read.add(what)
            if what == "base":
                place.by = by
                based.append(place)
        return based


def _in_compiled_code() -> bool:
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) != _COMPILED:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class _Reads(TorchDispatchMode):
    """Notes which tensors the operators of a forward take."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """`torch.cond` compiles its branches when it is called: the compiler shall not meet the mode."""
        return True

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "overloadpacket", func), "__name__", str(func))
        if not _looks_only(func, name):
            for value in tree_leaves((args, kwargs)):
                if type(value) in (Tensor, nn.Parameter):
                    for place in self._memory.read(value, name):
                        place.compiled = place.compiled or _in_compiled_code()
        return func(*args, **(kwargs or {}))


def _looks_only(func: Any, name: str) -> bool:
    """Whether an operator gives a view, or reads nothing but shape and dtype."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False
    view = not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)
    return view or name.endswith(_METADATA)


# -- what to watch -----------------------------------------------------------------------------------------------
def _plain(tensors: Iterable[Any]) -> list[Tensor]:
    """Those with memory of their own that can be told."""
    return [t for t in tensors if type(t) in (Tensor, nn.Parameter) and not t.is_meta and t.numel() and _dense(t)]


def _dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor.data) is Tensor


def _places(root: nn.Module, state: ModelState, names: Iterable[str]) -> list[_Place]:
    modules = grafted_modules(root)
    ties = tied_names(root)
    embeddings = {path for path, module in modules.items() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    found: list[_Place] = []
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
                    found.append(_Place(site.name, name, id(modules[path]), base, own, looked_up=bool(others)))
        followed = {tie.full for tie in record.ties}
        for path in record.train if state.weights.get(name, 1) == 1 else ():
            copied = modules[path]._modules[ADAPTERS]._modules[name]  # type: ignore[union-attr]
            base = []
            for n, parameter in modules[path].named_parameters():
                within = {f"{path}.{n}", *followed}
                if f".{ADAPTERS}." not in f".{n}" and ties.get(f"{path}.{n}", within) <= within:
                    base += _plain([parameter])
            own = _plain(copied.parameters())  # type: ignore[union-attr]
            if base and own:
                found.append(_Place(path, name, id(modules[path]), base, own, trained=True))
    return found


# -- judging -----------------------------------------------------------------------------------------------------
def _judge(places: Iterable[_Place]) -> None:
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
    places: list[_Place]
    mode: _Reads
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
        _run = _Run(root, names, places, _Reads(_Memory(places)), sys._getframe(2), threading.get_ident())
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
    memory = _Memory(places)
    for node, tensor in inputs.items():
        for user in node.users:
            name = getattr(user.target, "__name__", str(user.target))
            memory.read(tensor, name)
    try:
        _judge([place for place in places if place.read])
    except AdapterError as error:
        return error
    return None
