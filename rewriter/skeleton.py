"""Copy a model's modules without copying its tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .errors import CaptureError
from .state import Container, M, strip_wrappers, unwrap


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """A new, frozen parameter over the same storage: flags and `.data` of the original stay out of reach."""
    if type(parameter) is nn.Parameter or nn.Parameter not in type(parameter).__mro__:
        alias = nn.Parameter(parameter.detach(), requires_grad=False)
        alias.__dict__.update(parameter.__dict__)
        return alias
    # A subclass with state of its own (bitsandbytes' Params4bit): its own shallow copy knows what belongs to it.
    alias = copy.copy(parameter)
    if alias.is_floating_point():
        alias.requires_grad_(False)
    return alias


def copy_skeleton(model: M) -> M:
    """A copy of every module; parameters become frozen aliases over the same storage, ties are kept.

    Tensors of adapters are copied: training one in the copy must not train it in the original. Buffers are shared,
    except the running statistics of normalisation layers, which are written in training. Everything else an attribute
    holds is deep-copied.
    """
    memo: dict[int, Any] = {}
    keep: list[Tensor] = []  # deepcopy's memo is keyed by id: the keys must stay alive
    adapters = {id(m) for c in model.modules() if isinstance(c, Container) for m in c.modules()}
    for module in model.modules():
        if id(module) in adapters:
            for name in module._non_persistent_buffers_set:  # derived: never written, so shared
                memo[id(module._buffers[name])] = module._buffers[name]
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter)
                keep.append(parameter)
        writes_buffers = isinstance(module, _NormBase) and module.track_running_stats
        for value in [*module._buffers.values(), *module.__dict__.values()]:
            if isinstance(value, Tensor) and id(value) not in memo and not writes_buffers:
                memo[id(value)] = value
                keep.append(value)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} holds something that cannot be copied ({type(error).__name__}: {error}); "
            "remove it from the model's attributes before rewriting"
        ) from error


def bare(model: nn.Module) -> nn.Module:
    """What an exporter captures: the model inside its wrappers; where children are wrapped, a copy without."""
    model = unwrap(model)
    if all(unwrap(module) is module for module in model.modules()):
        return model
    return strip_wrappers(copy_skeleton(model))
