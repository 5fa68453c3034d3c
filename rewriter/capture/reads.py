"""What a forward read while it was traced, and how a call sees that it is another now."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .value_keys import Opaque, Same, freeze, is_comparable, is_fixed

MISSING = ("missing",)


@dataclass(frozen=True)
class Read:
    """Something a forward read: its place, and its value then.

    Args:
        path: attribute names, from `root` on; the first is the name of the variable where `root` is a closure's cell.
        frozen: the value as a key; the class alone of an object whose reads were noted one by one; a `Same` of what
            counts as itself (a function, a class).
        root: None for the module, or a Python module, a class or a cell.
        value: a copy of the value, or the value itself where it counts as itself.
        own: whether it is an attribute the module itself holds, so that setting it is seen.
    """

    path: tuple[str, ...]
    frozen: Hashable
    root: Any = None
    value: Any = None
    own: bool = False

    @property
    def text(self) -> str:
        start = "self" if self.root is None else getattr(self.root, "__name__", "closure")
        return ".".join((start, *self.path))

    def now(self, module: nn.Module) -> Hashable:
        """The key of what is at this place today."""
        value: Any = module if self.root is None else self.root
        for name in self.path:
            if isinstance(value, types.CellType):
                value = value.cell_contents
            elif isinstance(value, nn.Module) and name in value._modules:
                value = value._modules[name]
            else:
                value = getattr(value, name, MISSING)
        if value is MISSING:
            return MISSING
        if isinstance(self.frozen, type):
            return type(value)  # type: ignore[return-value]
        if isinstance(self.frozen, Same):
            return Same(value)
        try:
            return freeze(value)
        except Opaque:
            return None

    @property
    def watchable(self) -> bool:
        """Whether a call must look, since nothing else would see a change: of what the module itself holds, setting is
        seen, and filling is not."""
        return not self.own or not (self.frozen is MISSING or isinstance(self.frozen, type) or is_fixed(self.value))

    def differs(self, holder: str, value: str) -> str:
        """Python that says whether this is no longer so, for the text of what holds it and that of `self.value`."""
        name = self.path[-1]
        if self.frozen is MISSING:
            return f"hasattr({holder}, {name!r})"
        if isinstance(self.root, types.CellType) and len(self.path) == 1:
            place = f"{holder}.cell_contents"
        else:
            place = attribute_of(holder, name)
        if isinstance(self.frozen, type):
            return f"type({place}) is not {value}"
        itself = isinstance(self.frozen, Same) or self.value is None or isinstance(self.value, bool)
        parts = [f"{place}{part} != {value}{part}" for part in _held_by_function(self.value)]
        return " or ".join([f"{place} {'is not' if itself else '!='} {value}", *parts])


def _held_by_function(value: Any) -> Iterator[str]:
    """Python behind a function that reads its defaults and what it closes over.

    A compiler takes functions of one code for the same until one of these is asked for.
    """
    if not isinstance(value, types.FunctionType):
        return
    if value.__defaults__ and is_comparable(value.__defaults__):
        yield ".__defaults__"
    for index, cell in enumerate(value.__closure__ or ()):
        inside = f".__closure__[{index}].cell_contents"
        if is_comparable(cell.cell_contents) and not isinstance(cell.cell_contents, types.FunctionType):
            yield inside
        yield from (f"{inside}{rest}" for rest in _held_by_function(cell.cell_contents))


def attribute_of(holder: str, name: str) -> str:
    """The text of Python that reads an attribute."""
    return f"{holder}.{name}" if name.isidentifier() else f"getattr({holder}, {name!r})"
