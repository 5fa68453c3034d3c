"""Weights that accelerate's hooks keep in CPU memory or on disk and load for each call (`cpu_offload`,
`disk_offload`, `dispatch_model`, transformers' `device_map`).

    module._parameters[name]    a stand-in on the meta device, but for the time of a call
    hook.weights_map[name]      the values

Adapters are small: their tensors stay where the layer computes. What is exported is a copy with its values in place.
"""

from __future__ import annotations

import collections
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError

HOOK = "_hf_hook"
HOOKED = "_old_forward"  # where accelerate keeps the forward that its hook on a module calls
#: methods that `dispatch_model` replaces on a root; its own hold on to the model they were made for
_MOVES = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate's hook stands before a module's own forward."""
    held = module.__dict__
    return "forward" in held and HOOKED in held and getattr(held[HOOKED], "__self__", None) is module


def follow_class(module: nn.Module) -> None:
    """accelerate's hook on a module calls the forward that it found there: make it that of the class now."""
    if is_hooked(module):
        module.__dict__[HOOKED] = types.MethodType(type(module).forward, module)


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get(HOOK)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def offloading(module: nn.Module) -> list[Any]:
    """The hooks of a module that load its tensors for each call."""
    return [h for h in _hooks(module) if getattr(h, "offload", False) and getattr(h, "weights_map", None) is not None]


def values_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a module with its values, wherever they are kept."""
    tensor = module._parameters.get(name, module._buffers.get(name))
    if tensor is not None and tensor.is_meta:
        for hook in offloading(module):
            try:
                return hook.weights_map[name]
            except KeyError:  # of another hook, or a tensor without values anywhere
                continue
    return tensor


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a module computes with a tensor of its own."""
    given = [h.execution_device for h in offloading(module) if h.execution_device is not None] if tensor.is_meta else []
    return torch.device(given[-1]) if given else tensor.device


def put_values(module: nn.Module, tensors: Mapping[str, nn.Parameter | Tensor | None]) -> None:
    """Give an offloaded module other parameters: its hook loads these from now on. The module's own stay stand-ins."""
    hooks = offloading(module)
    if not hooks:
        return
    kept = {name: t.detach() for name, t in tensors.items() if t is not None and not t.is_meta}
    for hook in hooks:
        hook.weights_map = collections.ChainMap(kept, hook.weights_map)
    for name in kept:
        if (parameter := module._parameters.get(name)) is not None:
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)


def shared_stores(model: nn.Module) -> list[Any]:
    """Where the hooks of a model keep its values: what a copy of the model shares."""
    return [hook.weights_map for module in model.modules() for hook in offloading(module)]


def release_moves(model: nn.Module) -> None:
    """Take from a copy of a dispatched model the methods that would move the model it is a copy of."""
    for module in model.modules():
        for name in _MOVES:
            if (moved := module.__dict__.get(name)) is not None and inspect.ismethod(inspect.unwrap(moved)):
                del module.__dict__[name]


def is_dispatched(model: nn.Module) -> bool:
    return any(is_hooked(module) for module in model.modules())


@torch.no_grad()
def loaded(model: nn.Module) -> nn.Module:
    """Take accelerate's hooks out of a copy of a model, in place: every tensor gets its values where it computes."""
    first: dict[tuple[Any, ...], tuple[nn.Parameter, Tensor]] = {}  # with what it was made of: its address stays taken
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            value = values_of(module, name)
            if value is None or value.is_meta:
                continue
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)  # what is tied stays tied
            held = value.to(device_of(module, parameter))
            first.setdefault(key, (nn.Parameter(held, parameter.requires_grad), value))
            module._parameters[name] = first[key][0]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta and (value := values_of(module, name)) is not None:
                module._buffers[name] = value.to(device_of(module, buffer))
        unhook(module)
    return model


def unhook(module: nn.Module) -> None:
    """Take accelerate's hook off a copy of a module, which has its values then."""
    for name in ("forward", HOOKED, HOOK) if is_hooked(module) else (HOOK,):
        module.__dict__.pop(name, None)


def stay(module: nn.Module, hook: Any) -> None:
    """Undo what a hook has done to an adapter's tensors: they are small, are trained, and are read without a call."""
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False):
            part.detach_hook(module)
        if getattr(part, "execution_device", None) is not None:
            module.to(part.execution_device)


def check_reachable(modules: Mapping[str, nn.Module], owners: Iterable[str]) -> None:
    """Raise `AdapterError` where a hook loads a whole block for each call: it would look for the adapter there too."""
    for owner in dict.fromkeys(owners):
        parts = owner.split(".") if owner else []
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            held = [hook for hook in offloading(modules[path]) if getattr(hook, "place_submodules", False)]
            if held and path in modules:
                raise AdapterError(
                    f"{owner or 'the root'!r} is offloaded by accelerate together with the whole of "
                    f"{path or 'the root'!r} (preload_module_classes, place_submodules), whose hook would look for the "
                    "adapter's tensors in its own store: dispatch the model without it, or rewrite it first and "
                    "dispatch it then"
                )
