"""What one call of a model is told, where the layers find it: values of the thread that makes the call.

    with given(adapter_ids=ids):        current("adapter_ids")  ->  ids
        model(x)

Modules are shared between threads and calls, so nothing a single call needs is ever written on them. Dynamo reads and
writes the attributes of a `threading.local` like those of any object: a compiled call guards on them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class _Values(threading.local):
    """Every thread starts with the values of `__init__`.

    They are no class attributes, and there is no `__dict__` but the thread's own: Dynamo would guard on that of the
    object, which no thread uses.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.adapter_ids: Any = None


_values = _Values()


def current(name: str) -> Any:
    """What the call that is going on in this thread was given under this name; the default outside any."""
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
