"""What adapters are told at a call: keyword arguments that the root's forward takes beside its own.

    model(input_ids)  ->  model(input_ids, adapter_ids=ids)

The root gets a generated subclass of its class whose forward puts the values where the sites find them, among those of
the call (`percall`), and takes them away afterwards. A compiler or exporter sees ordinary inputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import AdapterError
from .graft import BASE, attributes
from .percall import put

OWN_CLASS = f"{BASE}_inputs"  # plain attribute of a root: its class before `take_inputs`
NAMES = f"{BASE}_names"  # plain attribute of a root: what its forward takes beside its own arguments


class TakesInputs(nn.Module):
    """Mixin of the generated classes: copying keeps the class, pickling rebuilds it."""

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
        del root.__dict__[NAMES]


def take_inputs(root: nn.Module, names: Iterable[str]) -> None:
    """Make the root's forward take these inputs; without any, leave it alone."""
    names = tuple(dict.fromkeys(names))
    if not names:
        return
    root.__dict__[OWN_CLASS] = type(root)
    root.__dict__[NAMES] = names
    root.__class__ = _class(type(root), names)


def _class(own: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name, None) for name in names}
        _check_batch(given, args, kwargs)
        before = {name: put(name, value) for name, value in given.items()}
        try:
            return own.forward(self, *args, **kwargs)
        finally:
            for name, value in before.items():
                put(name, value)

    forward.__signature__ = _extended(own, names)  # type: ignore[attr-defined]
    return type(own.__name__, (TakesInputs, own), {"__module__": own.__module__, "forward": forward})


def _extended(own: type[nn.Module], names: tuple[str, ...]) -> inspect.Signature:
    """The own forward's signature with the new keywords: generate() and torch.export read it."""
    signature = inspect.signature(own.forward)
    parameters = list(signature.parameters.values())
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return signature.replace(parameters=[p for p in parameters if p not in rest] + added + rest)


def _check_batch(given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Each value is a vector with an entry per sample of the model's first tensor argument."""
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim()), None)
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.is_floating_point():
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
            raise AdapterError(f"{name}={what}: give a vector of whole numbers, one per sample of the batch")
        if first is not None and value.shape[0] != first.shape[0]:
            raise AdapterError(
                f"{name} has {value.shape[0]} entries and the batch {first.shape[0]} samples: give one per sample"
            )
