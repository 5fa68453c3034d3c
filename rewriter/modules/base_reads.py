"""Which tensors of a model a run reads: the base's at a site, or what an adapter brings with or instead of them.

What is read is told by memory: a mode sees the arguments of every operator."""

from __future__ import annotations

import bisect
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_METADATA = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
#: what every call of compiled code goes through; its module is only imported when something is compiled
_COMPILED = (os.path.join(os.path.dirname(torch.__file__), "_dynamo", "eval_frame.py"), "compile_wrapper")
_LOOKUPS = ("embedding", "embedding_bag", "_embedding_bag", "embedding_renorm_")


@dataclass
class Place:
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


class PlaceMemory:
    """Which places a tensor's memory belongs to."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._at: dict[int, tuple[int, list[tuple[Place, str]]]] = {}
        for place in places:
            for what, tensors in (("base", place.base), ("adapted", place.adapted)):
                for tensor in tensors:
                    start = tensor.data_ptr()
                    end, found = self._at.get(start, (0, []))
                    self._at[start] = max(end, start + tensor.nbytes), [*found, (place, what)]
        self._starts = sorted(self._at)

    def read(self, tensor: Tensor, by: str) -> list[Place]:
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


class Reads(TorchDispatchMode):
    """Notes which tensors the operators of a forward take."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """`torch.cond` compiles its branches when it is called: the compiler shall not meet the mode."""
        return True

    def __init__(self, memory: PlaceMemory) -> None:
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
