"""What one call of a model is told, where the layers find it: values of the thread that makes the call.

    with given(adapter_ids=ids):        current("adapter_ids")  ->  ids
        model(x)

Modules are shared between threads and calls, so nothing a single call needs is ever written on them. Dynamo reads and
writes the attributes of a `threading.local` like those of any object: a compiled call guards on them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from ..capture.captured import captured
from ..errors import AdapterError


class _Values(threading.local):
    """Every thread starts with the values of `__init__`.

    They are no class attributes, and there is no `__dict__` but the thread's own: Dynamo would guard on that of the
    object, which no thread uses.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.adapter_ids: Any = None
        self.admitted = False  # whether the call that a model's forward is about to see has been checked
        self.probe: Any = None  # what looks at a run of the model, where one goes on
        self.inside = False  # whether a call of a model that takes such values goes on


_values = _Values()


def current(name: str) -> Any:
    """What the call that is going on in this thread was given under this name; the default outside any."""
    if not _values.inside and not captured() and torch._C._current_graph_task_id() != -1:
        return _recomputed(name)
    return getattr(_values, name)


def put(name: str, value: Any) -> Any:
    """Give the layers a value from here on; returns what to put back at the end."""
    before = getattr(_values, name)
    setattr(_values, name, value)
    return before


@contextlib.contextmanager
def given(**values: Any) -> Iterator[None]:
    """Inside the block `current(name)` is the value, in this thread."""
    before = {name: put(name, value) for name, value in values.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            put(name, value)


# -- gradient checkpointing --------------------------------------------------------------------------------------
# A backward runs layers again, long after the call. The autograd node it is at was made during the call, and nodes are
# numbered in the order in which they are made.
_calls: deque[tuple[int, int, dict[str, Any]]] = deque()
_KEPT = 512
_forgotten = 0  # nodes below this number may be of calls that are no longer kept


@contextlib.contextmanager
def remembered(values: dict[str, Any]) -> Iterator[None]:
    """Keep the values of a call that records a graph for what its backward computes again."""
    start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _calls.append((start, torch.autograd._get_sequence_nr(), values))  # type: ignore[attr-defined]
        if len(_calls) > _KEPT:
            global _forgotten
            _forgotten = max(_forgotten, _calls.popleft()[1])


def _recomputed(name: str) -> Any:
    number = torch._C._current_autograd_node()._sequence_nr()  # type: ignore[attr-defined]
    found = [values[name] for start, end, values in list(_calls) if start <= number < end and name in values]
    if number < _forgotten or not found or any(one is not found[0] for one in found):
        raise AdapterError(
            "a backward computes a layer of a bank again (gradient checkpointing), and the call it belongs to cannot "
            "be told: run the calls of a bank that need gradients in one thread, or without gradient checkpointing"
        )
    return found[0]
