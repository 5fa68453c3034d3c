"""What adapters are told at a call: keyword arguments that the root's forward takes beside its own.

    model(input_ids)  ->  model(input_ids, adapter_ids=ids)

The root gets a generated subclass of its class whose forward puts the values where the sites find them, among those of
the call (`call_values.py`), and takes them away afterwards. A compiler or exporter sees ordinary inputs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from ..capture.captured import captured
from ..errors import AdapterError
from ..grafted_class import BASE, attributes
from ..modules.offloaded import follow_class
from .call_values import put

OWN_CLASS = f"{BASE}_inputs"  # plain attribute of a root: its class before `take_inputs`
GUARD = f"{BASE}_guard"  # plain attribute of a root: what checks its calls, if anything does
NAMES = f"{BASE}_names"  # plain attribute of a root: what its forward takes beside its own arguments


class Guard(Protocol):
    """What watches over the calls of a root, in its attribute `GUARD`."""

    batch_axis: int

    def call(
        self, root: nn.Module, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[dict[str, Any]]:
        """Around a call: check what it was given, and give out what the layers get."""

    def generation(
        self, root: nn.Module, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[dict[str, Any]]:
        """Around `generate`, whose calls of the forward have a guard of their own."""

    def compiled(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same inside a graph that is being captured: checks that a graph can make."""


class TakesInputs(nn.Module):
    """Mixin of the generated classes: copying keeps the class, pickling rebuilds it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler leaves this frame alone and compiles the forward inside; in a graph of someone else's it is plain.
        guard = self.__dict__.get(GUARD)
        if guard is None or captured():
            return super().__call__(*args, **kwargs)
        call = _aside(_begin, guard, self, args, kwargs)
        try:
            result = super().__call__(*args, **kwargs, **call.given)
        except BaseException as error:
            _aside(_end, call, error)
            raise
        _aside(_end, call, None)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> TakesInputs:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(attributes(self), memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class cannot be imported; it is a function of the own class, which pickles as it always did.
        plain = attributes(self)
        return (_rebuild, (), {"own": _as_own_class(self, plain)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state["own"]
        self.__dict__.update(own.__dict__)
        self.__class__ = own.__class__
        take_inputs(self, self.__dict__[NAMES])


def _aside(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which no compiler looks at: `torch.compiler.disable` with a tenth of its cost per call."""
    compiler = set_eval_frame(None)
    try:
        return function(*args)
    finally:
        set_eval_frame(compiler)


@functools.cache
def _leave_frames_alone() -> None:
    """Tell Dynamo to compile what these frames call, but not the frames. It takes a second to import."""
    from torch._dynamo.eval_frame import skip_code

    for function in (TakesInputs.__call__, captured, _aside):
        skip_code(function.__code__)


class _Call:
    """A call that goes on: what the guard does around it, and what the forward is given."""

    def __init__(self, around: AbstractContextManager[dict[str, Any]]) -> None:
        self.around = around
        self.given = {name: value for name, value in around.__enter__().items() if value is not None}
        self.admitted = put("admitted", True)


def _begin(guard: Guard, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    given = {name: kwargs.pop(name, None) for name in root.__dict__[NAMES]}
    return _Call(guard.call(root, given, args, kwargs))


def _end(call: _Call, error: BaseException | None) -> None:
    put("admitted", call.admitted)
    if error is None:
        call.around.__exit__(None, None, None)
    else:
        call.around.__exit__(type(error), error, error.__traceback__)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The own `generate`: the parts of the model that it calls past the forward (an encoder) are told the same."""
    own = self.__dict__[OWN_CLASS]
    given = {name: kwargs.get(name) for name in self.__dict__[NAMES]}
    guard = self.__dict__.get(GUARD)
    if guard is None or all(value is None for value in given.values()):
        return own.generate(self, *args, **kwargs)
    with guard.generation(self, given, args, kwargs) as given:
        return _told(self, own.generate, given, args, {**kwargs, **given})


def _rebuild() -> TakesInputs:
    return TakesInputs.__new__(TakesInputs)


def _as_own_class(module: nn.Module, attributes: dict[str, Any]) -> nn.Module:
    own = module.__dict__[OWN_CLASS]
    view = own.__new__(own)
    view.__dict__ = {key: value for key, value in attributes.items() if key != OWN_CLASS}
    return view


def release_inputs(root: nn.Module) -> None:
    """Give a root its own class back."""
    if OWN_CLASS in root.__dict__:
        root.__class__ = root.__dict__.pop(OWN_CLASS)
        follow_class(root)
        del root.__dict__[NAMES]


def take_inputs(root: nn.Module, names: Iterable[str]) -> None:
    """Make the root's forward take these inputs; without any, leave it alone."""
    names = tuple(dict.fromkeys(names))
    if not names:
        return
    _leave_frames_alone()
    root.__dict__[OWN_CLASS] = type(root)
    root.__dict__[NAMES] = names
    root.__class__ = _class(type(root), names)
    follow_class(root)


def _class(own: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        admitted = put("admitted", False)
        try:
            guard = self.__dict__.get(GUARD)
            if guard is not None and not admitted and not captured():
                with guard.call(self, {name: kwargs.pop(name, None) for name in names}, args, kwargs) as given:
                    return _told(self, own.forward, given, args, kwargs)
            given = {name: kwargs.pop(name, None) for name in names}
            if not admitted:
                check_batch(given, args, kwargs, 0 if guard is None else guard.batch_axis)
                # Dynamo of torch 2.11 takes every trace for an export
                if guard is not None and (torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting()):
                    given = guard.compiled(given)
            return _told(self, own.forward, given, args, kwargs)
        finally:
            put("admitted", admitted)

    forward.__signature__ = _extended(own, names)  # type: ignore[attr-defined]
    namespace = {"__module__": own.__module__, "forward": forward}
    if callable(getattr(own, "generate", None)):
        namespace["generate"] = _generate
    return type(own.__name__, (TakesInputs, own), namespace)


def _told(self: nn.Module, function: Any, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(self, *args, **kwargs)`, with the values where the sites find them."""
    before = {name: put(name, value) for name, value in given.items()}
    inside = put("inside", True)
    try:
        return function(self, *args, **kwargs)
    finally:
        put("inside", inside)
        for name, value in before.items():
            put(name, value)


def _extended(own: type[nn.Module], names: tuple[str, ...]) -> inspect.Signature:
    """The own forward's signature with the new keywords: generate() and torch.export read it."""
    signature = inspect.signature(own.forward)
    parameters = list(signature.parameters.values())
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return signature.replace(parameters=[p for p in parameters if p not in rest] + added + rest)


def check_batch(given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> None:
    """Each value is a vector with an entry per sample of the model's first tensor argument."""
    first = first_tensor(args, kwargs, axis)
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype not in _WHOLE:
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
            raise AdapterError(f"{name}={what}: give a vector of whole numbers (int64), one per sample of the batch")
        if first is not None and value.shape[0] != first.shape[axis]:
            raise AdapterError(
                f"{name} has {value.shape[0]} entries and the batch {first.shape[axis]} samples (dimension {axis} of "
                f"{tuple(first.shape)}): give one per sample"
            )


_WHOLE = (torch.int64, torch.int32)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> torch.Tensor | None:
    """The model's first tensor argument with a dimension for samples; where none is one, the first in a dict."""
    given = (*args, *kwargs.values())
    found = next((v for v in given if isinstance(v, torch.Tensor) and v.dim() > axis), None)
    if found is not None:
        return found
    inner = (v for one in given if isinstance(one, dict) for v in one.values())
    return next((v for v in inner if isinstance(v, torch.Tensor) and v.dim() > axis), None)
