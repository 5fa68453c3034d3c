"""What a forward reads and changes while torch.fx runs it once.

A graph keeps what the forward read of Python as constants and loses what it wrote. So the forward runs on a protected
copy, whose objects note every read and every write. A graph holds for as long as all that was read is what it was; a
forward that writes is refused.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..adapter_tensors import Container
from ..errors import CaptureError
from ..modules.offloaded import HOOK
from .reads import MISSING, Read
from .value_keys import Opaque, Same, freeze, is_comparable, is_fixed, is_plain

#: nn.Module bookkeeping that does not influence what forward computes, or that a graph reads itself
_BOOKKEEPING = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook",
                "training", "call_super_init", "dump_patches", "_version", "_compiled_call_impl",
                "T_destination"}  # fmt: skip
#: what is read of a call that was prepared: each part of it may be another later
_MADE_OF: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    types.MethodType: ("__func__", "__self__"),
}


def is_bookkeeping(attribute: str) -> bool:
    return attribute in _BOOKKEEPING or "_hooks" in attribute or attribute.startswith(("_fxgraft", "fxgraft"))


class _Namespace(types.SimpleNamespace):
    pass


def protected(module: nn.Module) -> nn.Module:
    """A copy of a module, without hooks: its own forward is what counts. Its tensors are on the meta device, so that
    what a forward does to them behind torch.fx's back is done to nothing."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name == HOOK:  # accelerate's, which holds all weights
                memo[id(value)] = value
            elif isinstance(value, Tensor):
                memo[id(value)] = _stand_in(value)
            elif "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(tensor)
        if isinstance(part, Container):
            memo[id(part)] = part
    return copy.deepcopy(module, memo)


def _stand_in(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


class Observation:
    """Notes what happens to the protected copy `twin` of a module."""

    def __init__(self, module: nn.Module, twin: nn.Module, tracer: fx.Tracer) -> None:
        self.name = type(module).__name__
        self.reads: dict[tuple[str, ...], Read] = {}
        self.writes: list[str] = []
        self._module, self._tracer = module, tracer
        self._values: list[tuple[Read, Any]] = []
        self._substitutes: dict[tuple[str, ...], Any] = {}
        self._classes: list[type] = []
        self._held: list[tuple[str, nn.Module, dict[str, Any]]] = []
        # adapters are no copies, see `protected`
        adapters = {id(part) for held in twin.modules() if isinstance(held, Container) for part in held.modules()}
        for path, child in list(twin.named_modules()):
            if id(child) not in adapters and not self._note_at(child, tuple(path.split(".")) if path else ()):
                raise CaptureError(f"{type(child).__name__} is of a class that cannot be derived from")
            self._held.append((path, child, dict(child.__dict__)))

    def _note_at(self, target: Any, path: tuple[str, ...]) -> bool:
        """Give an object of the copy a class that notes what is read and written; False where Python cannot."""
        cls: Any = type(target)
        notes = self

        def __getattribute__(self: Any, name: str) -> Any:
            value = cls.__getattribute__(self, name)
            return value if name[:2] == "__" else notes._read(self, cls, path, name, value)

        def __getattr__(self: Any, name: str) -> Any:
            try:
                return cls.__getattr__(self, name)
            except AttributeError:
                if name[:2] != "__":
                    notes.reads.setdefault((*path, name), Read((*path, name), MISSING, own=not path))
                raise

        def __setattr__(self: Any, name: str, value: Any) -> None:
            notes.writes.append(".".join(("self", *path, name)))
            cls.__setattr__(self, name, value)

        def __delattr__(self: Any, name: str) -> None:
            notes.writes.append(".".join(("self", *path, name)))
            cls.__delattr__(self, name)

        def of_class(noting: Any, name: str) -> Any:
            value = type.__getattribute__(noting, name)
            if name[:2] != "__" and not (isinstance(target, nn.Module) and is_bookkeeping(name)):
                raw = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)
                if raw is not None and not hasattr(type(raw), "__get__") and (*path, name) not in notes.reads:
                    notes._add((*path, name), value, False)
            return value

        members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__getattribute__": __getattribute__,
                   "__getattr__": __getattr__, "__setattr__": __setattr__, "__delattr__": __delattr__}  # fmt: skip
        try:
            kind = type(type(cls).__name__, (type(cls),), {"__getattribute__": of_class})
            noting = kind(cls.__name__, (cls,), members)
            object.__setattr__(target, "__class__", noting)
        except TypeError:
            return False
        self._classes.append(noting)
        return True

    def _read(self, owner: Any, cls: type, path: tuple[str, ...], name: str, value: Any) -> Any:
        held = object.__getattribute__(owner, "__dict__")
        if isinstance(owner, nn.Module) and (is_bookkeeping(name) or isinstance(value, nn.Module)):
            return value
        if name not in held:
            raw = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)
            if isinstance(raw, staticmethod):
                self._count_as_itself((name,), value, cls)
            if raw is None or hasattr(type(raw), "__get__"):
                return value  # a method, a property: what it reads is noted, and that it ran (`surroundings.py`)
        place = (*path, name)
        if isinstance(value, Tensor) and isinstance(owner, nn.Module):
            return self._tracer.create_proxy("get_attr", ".".join(place), (), {})
        if place not in self.reads:
            self._add(place, value, not path and name in held)
        return self._substitutes.get(place, value)

    def _add(self, place: tuple[str, ...], value: Any, own: bool) -> None:
        """Note a value; an object of Python's own notes from now on what is read of it."""
        kind = type(value)
        if self._is_copy(place, value) and is_plain(kind):
            target = value
            if kind is types.SimpleNamespace:  # its class cannot be changed
                target = self._substitutes[place] = _Namespace(**vars(value))
            if self._note_at(target, place):
                self.reads[place] = Read(place, kind, value=kind, own=own)  # type: ignore[arg-type]
                return
        if kind in _MADE_OF:
            self.reads[place] = Read(place, kind, value=kind, own=own)  # type: ignore[arg-type]
            for name in _MADE_OF[kind]:
                if not isinstance(part := getattr(value, name), nn.Module):
                    self._add((*place, name), part, own)  # no part is ever set: `keywords` may be filled
            return
        if not own and is_fixed(value) and not is_comparable(value):  # a lambda: another is never equal
            return self._count_as_itself(place, self._original(place))
        name = ".".join(("self", *place))
        try:
            read = Read(place, freeze(value), value=copy.deepcopy(value) if is_comparable(value) else value, own=own)
        except Opaque as opaque:
            raise CaptureError(f"it reads {name}, and what that holds, {opaque}, cannot be followed") from opaque
        if not is_comparable(value) and not is_fixed(value):
            raise CaptureError(f"it reads {name}, and whether that {kind.__name__} changes later cannot be seen")
        self.reads[place] = read
        self._values.append((read, value))

    def _count_as_itself(self, place: tuple[str, ...], value: Any, root: Any = None) -> None:
        key = place if root is None else (root, *place)
        self.reads[key] = Read(place, Same(value), root, value)

    def _original(self, place: tuple[str, ...]) -> Any:
        held: Any = self._module
        for name in place:
            held = getattr(held, name, None)
        return held

    def _is_copy(self, place: tuple[str, ...], value: Any) -> bool:
        """Whether an object is the copy's own: some (an enum's members) are never copied."""
        original = self._original(place)
        return original is not None and original is not value and type(original) is type(value)

    def changed(self) -> list[str]:
        """What the forward has changed: attributes it set, containers it filled, class attributes."""
        filled = [read.text for read, value in self._values if _differs(read, value)]
        for cls in self._classes:
            added = set(vars(cls)) - {"__doc__", "__dict__", "__weakref__", "__slots__", "__static_attributes__",
                                      "__firstlineno__", "__annotations__", "__annotations_cache__"}  # fmt: skip
            filled += [f"{cls.__name__}.{n}" for n in added if not n.startswith("__")]
        for path, module, before in self._held:
            now = module.__dict__
            names = [n for n in {**before, **now} if before.get(n, MISSING) is not now.get(n, MISSING)]
            cached = [n for n in names if isinstance(getattr(type(module), n, None), functools.cached_property)]
            filled += [".".join(("self", *filter(None, [path]), n)) for n in names if n not in cached]
        return list(dict.fromkeys([*self.writes, *filled]))


def _differs(read: Read, value: Any) -> bool:
    try:
        return freeze(value) != read.frozen
    except Opaque:
        return True
