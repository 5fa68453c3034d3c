"""The classes of owners: the forward is the traced graph with the dialect nodes of the active adapters in it.

Owners of equal structure with equal adapters share ONE class, so `torch.compile` compiles them once; switching
adapters of equal structure changes a pointer only.
"""

from __future__ import annotations

import linecache
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .adapter_tensors import ADAPTERS, TIED, AdapterTensors, Container
from .base_names import lookup
from .calls.disabled import Switch
from .capture.observation import is_bookkeeping
from .capture.trace import trace
from .emitter import SLOT, WEIGHT
from .errors import CaptureError, FxgraftError
from .grafted_forward import compile_forward
from .grafted_graph import graft_graph
from .modules.missing_values import keeps_values
from .modules.offloaded import HOOKED, follow_class, is_hooked
from .modules.trained_copy import followed, only_off, plain, retrained
from .products.experts_forward import described_experts, experts_namespace
from .quantised.quantised import PRODUCT, members, quantised
from .sites import Site

HOSTED = "fxgraft_hosted"  # plain attribute of a host: adapter -> the owners below whose products it computes
FOLLOWS = "fxgraft_follows"  # plain attribute: what of TIED is active
BASE = "fxgraft_base"  # plain attribute of an owner: its class before grafting
FUSED = f"{BASE}_fused"  # plain attribute: an attribute that allows a fused path, and the value that forbids it
SWITCH = "fxgraft_switch"  # plain attribute of an owner: the model's switch


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a copy of a module takes over: not what `module.compile()` left on it, which calls the module itself."""
    return {key: value for key, value in module.__dict__.items() if key != "_compiled_call_impl"}


class Grafted(nn.Module):
    """Mixin of all generated classes: copying keeps the class, pickling rebuilds it.

    There is no `__deepcopy__`: a wrapper that hands unknown attributes to the module inside would find it there, and be
    copied as that module.
    """

    fxgraft_graph: fx.Graph | None = None
    fxgraft_reads: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set; where the graph depends on the attribute, take the class of the new value. All or nothing."""
        if name == "__class__":
            return super().__setattr__(name, value)
        slots = {**self.__dict__.get("_parameters", {}), **self.__dict__.get("_buffers", {})}
        before = slots.get(name, self.__dict__.get(name, self))
        super().__setattr__(name, value)
        method = name != "forward" and callable(getattr(base_class(self), name, None)) and not is_bookkeeping(name)
        if name not in self.fxgraft_reads and not method and (name not in slots or (before is None) == (value is None)):
            return
        try:
            renew_class(self)
        except FxgraftError:
            if before is self:
                super().__delattr__(name)
            else:
                super().__setattr__(name, before)
            raise

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As for any module; a copy that an adapter trains shows NaN where `to_empty` has taken its values."""
        result = super()._apply(fn, recurse)
        adapters = self._modules.get(ADAPTERS)
        copies = [m for m in adapters._modules.values() if not isinstance(m, Container)] if adapters is not None else []
        if copies and not keeps_values(fn):
            with torch.no_grad():
                for tensor in (t for m in copies for t in (*m.parameters(), *m.buffers())):  # type: ignore[union-attr]
                    if tensor.is_floating_point() and not tensor.is_meta:
                        tensor.fill_(float("nan"))
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class cannot be imported; it is a function of the base class and the slots.
        base = base_class(self)
        if base.__reduce__ is not object.__reduce__:
            return base.__reduce__(self)
        own = getattr(base, "__getstate__", None)
        state = attributes(self) if own is None or own is object.__getstate__ else own(self)
        return (_bare, (base,), state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        base = base_class(self)
        self.__class__ = base  # type: ignore[assignment]
        base.__setstate__(self, state)
        renew_class(self)


def _bare(base: type[nn.Module]) -> nn.Module:
    """An empty module of the class that grafting gives `base`, to be filled."""
    cls = _class((base, "bare"), base, {})
    bare = cls.__new__(cls)
    bare.__dict__[BASE] = base
    return bare


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before grafting."""
    return module.__dict__.get(BASE) or type(module)


def plain_view(module: nn.Module) -> nn.Module:
    """The module as it was before grafting: original class, same tensors and children, no adapters, none of
    accelerate's hooks.

    A module that was never grafted is returned as it is. The view shares every attribute with the module.
    """
    if BASE not in module.__dict__ and ADAPTERS not in module._modules and not is_hooked(module):
        return module
    base = base_class(module)
    view = object.__new__(base)  # the class' own may ask for arguments, and that of a GraphModule makes another class
    hidden: tuple[str, ...] = (SLOT, WEIGHT, BASE, SWITCH, TIED, FOLLOWS, HOSTED)
    hidden += ("forward", HOOKED) if is_hooked(module) else ()
    view.__dict__ = {k: v for k, v in attributes(module).items() if not k.startswith(hidden)}
    view.__dict__["_modules"] = {k: v for k, v in module._modules.items() if not isinstance(v, Container)}
    return view


def restore_class(owner: nn.Module) -> None:
    """Give an owner without adapters its original class back."""
    owner.__class__ = owner.__dict__.pop(BASE)
    for attribute in [a for a in owner.__dict__ if a.startswith((SLOT, WEIGHT, FOLLOWS, FUSED, SWITCH, TIED, HOSTED))]:
        del owner.__dict__[attribute]
    follow_class(owner)


def forbid_fused(module: nn.Module, attribute: str, value: object, switch: Switch) -> None:
    """Let an attribute that allows a fused path over adapted children read as `value`, except inside `disabled`."""
    module.__dict__.setdefault(BASE, type(module))
    module.__dict__.update({FUSED: (attribute, value), SWITCH: switch})
    renew_class(module)


def allow_fused(module: nn.Module) -> None:
    """Undo `forbid_fused`."""
    if module.__dict__.pop(FUSED, None) is None:
        return
    if ADAPTERS in module._modules or TIED in module.__dict__:
        renew_class(module)
    else:
        restore_class(module)


_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()


def _slots(owner: nn.Module) -> list[nn.Module]:
    return [value for key, value in owner.__dict__.items() if key.startswith(SLOT)]


def _weights(owner: nn.Module) -> dict[int, torch.Tensor]:
    return {int(k.removeprefix(WEIGHT)): v for k, v in owner.__dict__.items() if k.startswith(WEIGHT)}


def renew_class(owner: nn.Module) -> None:
    """Give an owner the class that its slots and attributes ask for now."""
    owner.__class__ = class_for(owner, _slots(owner), _weights(owner), owner.__dict__.get(FOLLOWS, {}))
    follow_class(owner)


def class_for(
    owner: nn.Module, slots: Sequence[nn.Module], weights: Mapping[int, Any], follows: Mapping[str, Any]
) -> type[nn.Module]:
    """The class that computes an owner with these slots; `weights` says which of them are weighted."""
    base, fused = base_class(owner), owner.__dict__.get(FUSED)
    unfused = {} if fused is None else {fused[0]: only_off(*fused)}
    held = tuple((name, leaf) for name, (_, leaf) in follows.items())
    tied = {name: followed(name) for name, _ in held}
    if slots and not isinstance(slots[0], AdapterTensors):
        names, namespace = retrained(base, owner, 0 in weights)
        return _class((base, "retrained", names, 0 in weights, fused), base, {**namespace, **unfused})
    if not slots:
        return _class((base, held, fused), base, {**plain(base), **tied, **unfused})
    own = [slot for slot in slots if isinstance(slot, AdapterTensors)]
    if own[0].site is not None and own[0].site.experts:
        made: tuple[Any, ...] = (base, "experts", described_experts(own, weights), held)
        return _classes.get(made) or _class(made, base, {**tied, **experts_namespace(base, own, weights)})
    view = plain_view(owner)
    traced = trace(view)
    given: list[Site] = [s.site for s in slots]  # type: ignore[misc]
    sites = [site.at_host() for site in given]
    described = tuple(
        (site.weight, site.bias, site.rows, slots[index].method, index in weights) for index, site in enumerate(sites)
    )
    key = (traced.signature, described, held)
    known = _classes.get(key)
    if known is None:
        parameters = {n: p for n, p in view._parameters.items() if p is not None}
        for within in dict.fromkeys(site.within for site in given if site.within):
            below = lookup(owner, within)._parameters
            parameters.update({f"{within}.{n}": p for n, p in below.items() if p is not None})
        adapters = [(site, slots[i].method, i in weights) for i, site in enumerate(sites)]
        graph = graft_graph(traced.graph, parameters, adapters)  # type: ignore[arg-type]
        layer: dict[str, Any] = {} if (kind := quantised(view)) is None else members(base, kind)
        ways = [(absent, _way(other, parameters, adapters)) for absent, other in traced.ways]
        forward = compile_forward(graph, base, traced.reads, _renewed, layer.get(PRODUCT), ways)
        reads = frozenset(read.path[0] for read in traced.reads if read.root is None)
        namespace = {**tied, "forward": forward, "fxgraft_graph": graph, "fxgraft_reads": reads, **layer}
        known = _class(key, base, namespace)
        weakref.finalize(known, linecache.cache.pop, forward.__code__.co_filename, None)
    return known


def _way(graph: fx.Graph | None, parameters: Any, adapters: Any) -> fx.Graph | None:
    """The graph of a call that leaves arguments out with the adapters in it; None where they cannot be."""
    try:
        return None if graph is None else graft_graph(graph, parameters, adapters)
    except CaptureError:
        return None


def _class(key: tuple[Any, ...], base: type[nn.Module], namespace: Mapping[str, Any]) -> type[nn.Module]:
    known = _classes.get(key)
    if known is None:
        known = type(f"Grafted{base.__name__}", (Grafted, base), {"__module__": base.__module__, **namespace})
        _classes[key] = known
    return known


@torch._disable_dynamo  # torch.compiler.disable would load Dynamo at import
def _renewed(owner: nn.Module) -> Any:
    """The forward of an owner after something its graph depends on has changed outside of it."""
    before = type(owner)
    renew_class(owner)
    if type(owner) is before:
        raise CaptureError(
            f"{base_class(owner).__name__} depends on a value that is never what it was: adapt other layers"
        )
    return types.MethodType(type(owner).forward, owner)
