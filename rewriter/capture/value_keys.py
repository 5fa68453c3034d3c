"""A value as a key: equal for values a forward cannot tell apart, so `1`, `True`, `1.0` and `0.0`, `-0.0` are four.

Objects count by what they hold, functions by their code and what they close over: two layers with equal configs of
their own, or equal lambdas, are equal.
"""

from __future__ import annotations

import collections
import enum
import functools
import sys
import types
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = (int, bool, str, bytes, type(None), type(Ellipsis), type(NotImplemented), range, torch.dtype, torch.device,
          torch.layout, torch.memory_format)  # fmt: skip
_NAMED = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
          torch._ops.OpOverload, torch._ops.OpOverloadPacket)  # fmt: skip
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
_LIMIT = 10_000


class Opaque(Exception):
    """A value whose state cannot be read; the text says which."""


class Same:
    """Hashes any value by identity and keeps it alive, so that its id cannot be reused by another object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def freeze(value: Any) -> Hashable:
    """The key of a value. Raises `Opaque` for one whose state is out of reach (an iterator, a lock, a generator)."""
    return _freeze(value, {})


def _freeze(value: Any, seen: dict[int, int]) -> Hashable:
    kind = type(value)
    if kind in _ATOMS or isinstance(value, enum.Enum):
        return (kind, value)
    if kind is float:
        return (kind, value.hex())
    if kind is complex:
        return (kind, repr(value))
    if isinstance(value, _NAMED):
        return Same(value)
    if isinstance(value, nn.Module):
        return ("module", kind)
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if len(seen) > _LIMIT:
        raise Opaque("an object of more than 10,000 parts")
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size < _LIMIT):
        return (kind, str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = (value.__defaults__, value.__kwdefaults__, cells, vars(value))
        return ("function", value.__code__, Same(value.__globals__), *(_freeze(part, seen) for part in parts))
    if isinstance(value, types.MethodType):
        return ("method", _freeze(value.__func__, seen), _freeze(value.__self__, seen))
    if isinstance(value, functools.partial):
        return (kind, *(_freeze(part, seen) for part in (value.func, value.args, value.keywords)))
    held = _attributes(value)
    attributes = tuple((name, _freeze(held[name], seen)) for name in sorted(held))
    if isinstance(value, (tuple, list, collections.deque)):
        return (kind, tuple(_freeze(item, seen) for item in value), attributes)
    if isinstance(value, (set, frozenset)):
        return (kind, frozenset(_freeze(item, seen) for item in value), attributes)
    if isinstance(value, Mapping):
        return (kind, tuple((_freeze(k, seen), _freeze(v, seen)) for k, v in value.items()), attributes)
    if is_plain(kind):
        return (kind, attributes)
    raise Opaque(f"a {kind.__module__}.{kind.__qualname__}")


def is_plain(kind: type) -> bool:
    """Whether all that an object of this class holds are attributes: every class behind it is written in Python."""
    return all(
        cls in (object, types.SimpleNamespace) or ("__module__" in vars(cls) and bool(cls.__flags__ & _HEAP_TYPE))
        for cls in kind.__mro__
    )


def is_comparable(value: Any) -> bool:
    """Whether `==` with a copy says that a value is what it was: numbers, texts, names, containers of these."""
    if isinstance(value, float):
        return value == value
    if isinstance(value, (tuple, list, set, frozenset, collections.deque)):
        return all(map(is_comparable, value))
    if isinstance(value, dict):
        return all(is_comparable(k) and is_comparable(v) for k, v in value.items())
    if isinstance(value, types.FunctionType):
        return getattr(sys.modules.get(value.__module__), value.__qualname__, None) is value
    return type(value) in _ATOMS or isinstance(value, (enum.Enum, np.generic, *_NAMED))


def is_fixed(value: Any) -> bool:
    """Whether a value cannot change where it is: a number, a text, a function, a tuple of these."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_fixed, value))
    return type(value) in (float, complex, *_ATOMS) or isinstance(
        value, (enum.Enum, np.generic, types.FunctionType, types.MethodType, functools.partial, *_NAMED)
    )


def _attributes(value: Any) -> dict[str, Any]:
    names = {name for cls in type(value).__mro__ for name in _slots(cls)}
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **slots}


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))
