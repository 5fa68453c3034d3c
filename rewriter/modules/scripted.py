"""Modules that grafting cannot look into: compiled by `torch.jit`, or lazy ones whose weights have no shape yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import AdapterError, listing


def is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, scripted or not."""
    return isinstance(module, nn.Linear) or (is_scripted(module) and getattr(module, "original_name", "") == "Linear")


def why_scripted(module: nn.Module) -> str | None:
    """Why a module compiled by `torch.jit` cannot be adapted; None for any other."""
    if not is_scripted(module):
        return None
    return (
        "torch.jit compiled its module (script or trace), whose forward cannot be changed any more: rewrite the model "
        "before it is compiled"
    )


def share_scripted(model: nn.Module, twin: nn.Module) -> None:
    """Let the compiled modules of a model's copy, which copy their tensors too, compute with the model's parameters."""
    originals = dict(model.named_modules(remove_duplicate=False))
    for path, module in twin.named_modules():
        if not is_scripted(module):
            continue
        for name, parameter in originals[path]._parameters.items():
            if parameter is not None:
                module._c.setattr(name, _alias(parameter))  # type: ignore[operator, union-attr]


def _alias(parameter: Tensor) -> Tensor:
    return nn.Parameter(parameter.detach(), requires_grad=False)


def check_initialised(model: nn.Module) -> None:
    """Raise `AdapterError` for a model with lazy modules that have not run yet."""
    lazy = [
        path
        for path, module in model.named_modules()
        if any(t is not None and is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()))
    ]
    if lazy:
        raise AdapterError(
            f"{listing(lazy, 4)}: lazy modules whose weights have no shape yet, and would get other ones here than in "
            "the model given: run the model once on an example before rewrite"
        )
