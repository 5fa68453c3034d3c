"""`disabled`: which models are plain in the running context, and how the generated forwards see it.

    with turned_off(switch):      every owner of that model runs its base class' forward, in this thread and task only
        ...

The set of keys is a context variable: another thread, or another task of an event loop, meanwhile gets the adapted
model. Nothing is written on shared modules, so nothing can be left behind.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from ..capture.captured import captured
from ..errors import AdapterError

_keys: contextvars.ContextVar[Any] = contextvars.ContextVar("fxgraft_off")
_numbers = itertools.count()


class _Nothing:
    """What `keys` gives outside every block: itself.

    `keys` is a property in C, `ContextVar.get(self)`: Dynamo reads it as an attribute and guards on its value at every
    call, whereas it cannot trace a call of `get`.
    """

    keys = property(_keys.get)


nothing = _Nothing()


class Switch:
    """One per model, on its record and on every owner. A copy of a model is another model: it gets a key of its own."""

    def __init__(self) -> None:
        self.key = next(_numbers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return Switch()

    def __reduce__(self) -> Any:
        return Switch, ()


@contextlib.contextmanager
def turned_off(switch: Switch) -> Iterator[None]:
    """Inside the block the model of this switch is the base model, for this thread or task."""
    _keys.set((*_now(), switch.key))
    try:
        yield
    finally:
        left = list(_now())
        if switch.key in left:  # a generator may be closed in another context than it was started in
            left.remove(switch.key)
        _keys.set(tuple(left) or nothing)


def _now() -> tuple[int, ...]:
    keys = nothing.keys
    return () if keys is nothing else keys


def base_forward(base: type[nn.Module], product: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The forward of an owner's class before grafting, for calls inside `disabled`; `product` where that is one call
    that is guarded (`quantised/`)."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not captured():
            tell_recomputations()
        return (base.forward if product is None else product)(self, *args, **kwargs)

    return forward


def is_off(owner: nn.Module) -> bool:
    """Whether this call is of the base model."""
    keys = nothing.keys
    if keys is nothing or owner.fxgraft_switch.key not in keys:  # type: ignore[union-attr]
        return False
    if not captured():
        tell_recomputations()
    return True


# -- activation checkpointing ------------------------------------------------------------------------------------
class _Again:
    """A checkpointed function for the backward pass, in whatever thread: it sees the keys of the forward pass."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.keys = function, nothing.keys

    def __call__(self, *args: Any) -> Any:
        token = _keys.set(self.keys)
        try:
            return self.function(*args)
        finally:
            _keys.reset(token)


def tell_recomputations() -> None:
    """Tell every checkpoint that this call runs under what it shall see when the backward pass computes it again.

    torch compares shapes at most: without this, the gradient would be that of another function without a word.
    """
    if nothing.keys is nothing:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _Again.__call__.__code__:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            _tell(frame.f_code.co_name, frame.f_locals)
        frame = frame.f_back


def _tell(function: str, variables: Mapping[str, Any]) -> None:
    """`variables` are those of a function of `torch.utils.checkpoint` that is running."""
    if function in ("unpack_hook", "backward"):
        raise AdapterError(
            "a backward pass inside fg.disabled computes layers again (activation checkpointing) whose forward pass "
            "had the adapters: call backward() outside the block"
        )
    if function == "forward":  # the reentrant form
        holder, name = variables.get("ctx"), "run_function"
    elif function == "checkpoint" and "gen" in variables:
        suspended = variables["gen"].gi_frame
        holder, name = suspended and suspended.f_locals.get("new_frame"), "recompute_fn"
    else:
        return
    known = getattr(holder, name, None)
    if known is None and torch.is_grad_enabled():
        raise AdapterError(
            f"fg.disabled cannot follow activation checkpointing of torch {torch.__version__}: run the disabled "
            "forward under torch.no_grad(), or without checkpointing"
        )
    if known is not None and not isinstance(known, _Again):
        setattr(holder, name, _Again(known))
