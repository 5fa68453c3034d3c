"""Wrappers that other libraries put around modules: `torch.compile`, checkpointing, data parallel, FSDP."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


#: (package, class) of a wrapper -> the child that it calls. By class: a model of one's own may call a child `module`.
_WRAPPERS = {
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("torch", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("lightning", "_FabricModule"): "_forward_module",
    ("lightning_fabric", "_FabricModule"): "_forward_module",
}
_WRAPPED = frozenset(_WRAPPERS.values())


def unwrap(model: M) -> M:
    """The module inside wrappers, in any order: `torch.compile`, activation checkpointing, data parallel, FSDP."""
    while isinstance(model._modules, dict) and not _WRAPPED.isdisjoint(model._modules):
        kinds = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__)
        child = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
        inner = model._modules.get(child) if child is not None else None
        if inner is None:
            break
        model = inner  # type: ignore[assignment]
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is `torch.compile`'s wrapper around another."""
    return _WRAPPERS.get((type(module).__module__.partition(".")[0], type(module).__name__)) == "_orig_mod"


def strip_wrappers(model: M) -> M:
    """Take the wrappers of children out of a model, in place: what is merged or exported has none."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and (inner := unwrap(child)) is not child:
                module._modules[name] = inner
    return model
