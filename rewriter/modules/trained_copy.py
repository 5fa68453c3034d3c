"""What stands for a module that an adapter trains in full: in calls, and for a parent that reads its tensors.

The module keeps its own tensors, the base's. While the adapter is active its class hands calls and reads on to the
trained copy in slot 0; inside `disabled` they get the module's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapter_tensors import Container
from ..calls.disabled import base_forward, is_off

#: how a parent reads lists and dictionaries of modules and parameters, and an `nn.Sequential`
_CONTAINER_READS = ("__getitem__", "__iter__", "__len__", "__contains__", "__reversed__", "keys", "values", "items")


def retrained(base: type[nn.Module], owner: nn.Module, weighted: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names that are handed on, and the attributes of a class that stands for the trained copy in slot 0.

    A parent that reads `child.weight`, indexes a list of modules or calls another method than forward gets the trained
    values too. With a weight the tensors go between the two modules', which is exact for linears and embeddings.
    """
    children = (name for name, child in owner._modules.items() if not isinstance(child, Container))
    names = (*owner._parameters, *owner._buffers, *children)
    plain = base_forward(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_off(self):
            return plain(self, *args, **kwargs)
        return self.fxgraft_slot0(*args, **kwargs)  # type: ignore[operator]

    namespace: dict[str, Any] = {name: _between(name) if weighted else _trained(name) for name in names}
    namespace |= {method: _read(base, method, trained=True) for method in _reads(base)}
    return names, {**namespace, "forward": base.forward if weighted else forward}


def plain(base: type[nn.Module]) -> dict[str, Any]:
    """The attributes of a class without adapters: a list of modules does not show the adapters it holds."""
    return {method: _read(base, method, trained=False) for method in _reads(base)}


def followed(name: str) -> property:
    """A parameter of a module, read from the trained copy that it is tied to."""

    def read(self: Any) -> Any:
        own = _own(self, name)
        return own if is_off(self) or _fsdp_holds(self, own) else getattr(*self.fxgraft_follows[name])

    return property(read)


def only_off(attribute: str, value: object) -> property:
    """A plain attribute that is `value` while adapters are active, and its own inside `disabled`."""

    def read(self: Any) -> Any:
        return self.__dict__[attribute] if is_off(self) else value

    def write(self: Any, own: Any) -> None:
        self.__dict__[attribute] = own

    return property(read, write)


def _own(module: nn.Module, name: str) -> Any:
    for tensors in (module._parameters, module._buffers, module._modules):
        if name in tensors:
            return tensors[name]
    raise AttributeError(name)


def _fsdp_holds(module: nn.Module, own: Any) -> bool:
    """Whether FSDP2 keeps this parameter sharded now. Then it is FSDP2 that asks for it, by its name, and takes what it
    gets for its own: nobody else can compute with it before it is gathered."""
    return "_is_fsdp_managed_module" in module.__dict__ and hasattr(own, "full_tensor")


def _trained(name: str) -> property:
    def read(self: Any) -> Any:
        own = _own(self, name)
        return own if is_off(self) or _fsdp_holds(self, own) else getattr(self.fxgraft_slot0, name)

    return property(read)


def _between(name: str) -> property:
    def read(self: Any) -> Any:
        own = _own(self, name)
        if own is None or is_off(self) or _fsdp_holds(self, own):
            return own
        return own + self.fxgraft_weight0 * (getattr(self.fxgraft_slot0, name) - own)

    return property(read)


def _reads(base: type[nn.Module]) -> tuple[str, ...]:
    return tuple(method for method in _CONTAINER_READS if hasattr(base, method))


def _read(base: type[nn.Module], method: str, trained: bool) -> Callable[..., Any]:
    own = getattr(base, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if trained and not is_off(self):
            return getattr(self.fxgraft_slot0, method)(*args, **kwargs)
        children = {name: child for name, child in self._modules.items() if not isinstance(child, Container)}
        if issubclass(base, nn.ModuleDict):
            return getattr(children, method)(*args, **kwargs)
        if not issubclass(base, (nn.ModuleList, nn.Sequential)):
            return own(self, *args, **kwargs)
        items = list(children.values())
        if args and isinstance(args[0], slice):
            chosen = items[args[0]]
            return nn.Sequential(*chosen) if issubclass(base, nn.Sequential) else nn.ModuleList(chosen)
        return getattr(items, method)(*args, **kwargs)

    return call
