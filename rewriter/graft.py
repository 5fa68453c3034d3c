"""Put an adapter's tensors at its owners, take them away, and switch an owner to the adapters that are active now.

An owner is the module that owns a target weight. Grafting gives it a child with the adapter's tensors and a class
whose forward computes with them (`grafted_class.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter_tensors import ADAPTERS, TIED, AdapterTensors, Container, adapter_child
from .base_names import lookup
from .calls.disabled import Switch
from .emitter import SLOT, WEIGHT
from .errors import AdapterError
from .grafted_class import BASE, FOLLOWS, HOSTED, SWITCH, class_for
from .modules.offloaded import follow_class, is_hooked


def site_tensors(owner: nn.Module, adapter: str) -> list[AdapterTensors]:
    """The tensors of one adapter in one owner, a module per site."""
    container = adapter_child(owner, adapter)
    places = [] if container is None else [container, *container._modules.values()]
    return [held for held in places if isinstance(held, AdapterTensors)]


def add_adapter(owner: nn.Module, name: str, child: nn.Module, key: str = "") -> None:
    """Register an adapter's tensors (or a retrained copy) under `fxgraft.<name>[.<key>]` of the owner.

    Tensors without a key hold those with one: an owner may have sites on `weight` and on other parameters.
    """
    if owner._modules.get(ADAPTERS) is None:
        owner._modules[ADAPTERS] = Container()
    adapters = owner._modules[ADAPTERS]
    assert adapters is not None
    holder = adapters._modules.get(name)
    if not key:
        if holder is not None:
            child._modules.update(holder._modules)
        adapters._modules[name] = child
        return
    if holder is None:
        holder = adapters._modules[name] = Container()
    if key in holder._modules or key in holder._parameters or key in holder._buffers:
        raise AdapterError(f"{type(owner).__name__} has two sites that would both be called {key!r}: adapt one of them")
    holder._modules[key] = child


def drop_adapter(owner: nn.Module, name: str) -> None:
    """Undo `add_adapter` and `tie`; the last adapter takes the container with it. No slot may point at it any more."""
    if (adapters := owner._modules.get(ADAPTERS)) is not None:
        adapters._modules.pop(name, None)
        if not adapters._modules:
            del owner._modules[ADAPTERS]
    for attribute in (TIED, HOSTED):
        if (held := owner.__dict__.get(attribute)) is not None:
            held.pop(name, None)
            if not held:
                del owner.__dict__[attribute]


def tie(module: nn.Module, adapter: str, attribute: str, trained: nn.Module, name: str) -> None:
    """Let a parameter of a module be that of a trained copy while the adapter is active."""
    path, _, leaf = name.rpartition(".")
    module.__dict__.setdefault(TIED, {}).setdefault(adapter, {})[attribute] = (lookup(trained, path), leaf)


@dataclass(frozen=True)
class Change:
    """A switch of one owner, ready to be made: nothing of it can fail any more."""

    owner: nn.Module
    slots: tuple[nn.Module, ...]
    weights: Mapping[int, torch.Tensor]
    follows: Mapping[str, tuple[nn.Module, str]]
    cls: type[nn.Module]
    switch: Switch

    def make(self) -> None:
        """Slots first, then the class, then what the old class needed: a call going on elsewhere finds its tensors."""
        attributes = self.owner.__dict__
        attributes.setdefault(BASE, type(self.owner))
        attributes[SWITCH] = self.switch
        new: dict[str, Any] = {f"{SLOT}{index}": tensors for index, tensors in enumerate(self.slots)}
        new |= {f"{WEIGHT}{index}": weight for index, weight in self.weights.items()}
        if self.follows:
            new[FOLLOWS] = dict(self.follows)
        attributes.update(new)
        self.owner.__class__ = self.cls
        follow_class(self.owner)
        for attribute in [a for a in attributes if a.startswith((SLOT, WEIGHT, FOLLOWS)) and a not in new]:
            del attributes[attribute]


def planned(owner: nn.Module, names: Mapping[str, float], switch: Switch) -> Change:
    """The switch of an owner to these adapters (those it has), in order, with their weights. Changes nothing.

    Raises:
        CaptureError: the class that computes them cannot be built.
    """
    slots: list[Any] = []
    weights: dict[int, torch.Tensor] = {}
    for name, weight in names.items():
        child = adapter_child(owner, name)
        added: list[Any] = _own_sites(owner, name) if isinstance(child, Container) else [] if child is None else [child]
        for within in owner.__dict__.get(HOSTED, {}).get(name, ()):
            below = site_tensors(lookup(owner, within), name)
            added += [t for t in below if t.site is not None and t.site.host is not None]
        if weight != 1:
            for index, module in enumerate(added, len(slots)):
                weights[index] = _weight_tensor(weight, module)
        slots += added
    follows: dict[str, Any] = {}
    for name in names:
        follows |= owner.__dict__.get(TIED, {}).get(name, {})
    return Change(owner, tuple(slots), weights, follows, class_for(owner, slots, weights, follows), switch)


def _own_sites(owner: nn.Module, name: str) -> list[AdapterTensors]:
    """The tensors at the sites whose products the owner computes itself."""
    return [t for t in site_tensors(owner, name) if t.site is not None and t.site.host is None]


def host(module: nn.Module, name: str, within: str) -> None:
    """Let a module compute, for an adapter, products with the weights of an owner below it."""
    held = module.__dict__.setdefault(HOSTED, {})
    held[name] = tuple(dict.fromkeys((*held.get(name, ()), within)))


def _weight_tensor(weight: float, module: nn.Module) -> torch.Tensor:
    """A tensor, so that a compiled model takes another value as it is; on the device of what it weights."""
    like = next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(weight, dtype=dtype, device="cpu" if like.is_meta else like.device)


def check_forward(owner: nn.Module, path: str) -> None:
    """Raise `AdapterError` where a switch would have no effect: the forward was replaced on a grafted module."""
    if BASE in owner.__dict__ and "forward" in owner.__dict__ and not is_hooked(owner):
        raise AdapterError(
            f"the forward of {path!r} was replaced on the instance after rewrite, so switching adapters would not "
            "reach it: put the replacement on the base model's module before rewrite, or use a forward hook"
        )
