"""Quantised layers -> plain linear layers with the weights they compute with.

    Linear4bit, Linear8bitLt, torchao's, HQQLinear, ...  ->  nn.Linear        adapters stay where they are

For what knows plain weights only: merging, exporting, an estimate of the first update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.base_names import base_modules
from ...rewriter.capture.skeleton import copy_skeleton
from ...rewriter.errors import MergeError
from ...rewriter.grafted_class import BASE, renew_class
from ...rewriter.modules.save_hook import LOADED
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.quantised.quantised import quantised

#: what transformers leaves on a model that it has quantised
_MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable",
          "is_8bit_serializable", "quantization_method", LOADED)  # fmt: skip


@torch.inference_mode(False)
def dequantise(model: M, dtype: torch.dtype | None = None) -> M:
    """A copy of a model, adapted or not, whose quantised layers are plain `nn.Linear`; the rest is shared.

    It takes the memory of the weights in floating point. Adapters stay, and `model` stays as it is.

    Args:
        dtype: of the weights that were quantised; by default that of the model's other weights.

    Raises:
        MergeError: nothing is quantised, or `dtype` is none of floating point.
    """
    check_floating(dtype)
    root = unwrap(model)
    if not any(quantised(module) is not None for _, module in base_modules(root)):
        raise MergeError(f"dequantise({type(root).__name__}): none of its layers is quantised in a way that is known")
    return dequantised(copy_skeleton(root), dtype)


def plainly(model: M) -> M:
    """The model itself where nothing of it is quantised, else `dequantise(model)`."""
    root = unwrap(model)
    found = any(quantised(module) is not None for _, module in base_modules(root))
    return dequantised(copy_skeleton(root)) if found else model


def check_floating(dtype: object) -> None:
    """Raise `MergeError` for what is no dtype of a plain weight."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise MergeError(f"dtype={dtype!r}: weights are dequantised to torch.float32, bfloat16, float16 or float64")


def dequantised(
    root: M, dtype: torch.dtype | None = None, only: Callable[[str], bool] = lambda path: True, marks: bool = True
) -> M:
    """The model, which is a copy of one's own: its quantised layers are made plain in place, adapted ones too."""
    modules = dict(base_modules(root))
    kinds = {path: kind for path, module in modules.items() if (kind := quantised(module)) is not None}
    chosen = [path for path in kinds if only(path)]
    if not chosen:
        return root
    others = [
        p for path, m in modules.items() if path not in kinds for p in m._parameters.values() if p is not None
    ]  # fmt: skip
    floating = sorted((p for p in others if p.is_floating_point()), key=lambda p: p.dim() < 2)
    for path in chosen:
        module: Any = modules[path]
        kind = kinds[path]
        wanted = dtype or (floating[0].dtype if floating else kind.dtype(module))
        weight = kind.weight(module).to(wanted)
        kind.release(module)
        _become_linear(module, weight, None if module.bias is None else module.bias.detach().to(wanted))
    if marks and len(chosen) == len(kinds):
        _unmark(root)
    return root


def _become_linear(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Let a module of a copy be a plain linear layer; hooks, adapters and who holds it stay."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    held = module.__dict__
    kept = {k: v for k, v in held.items() if k in ("training", "_modules") or k.endswith("_hooks") or "fxgraft" in k}
    kept = {k: v for k, v in kept.items() if k not in ("fxgraft_layout", "_state_dict_hooks",
                                                       "_load_state_dict_pre_hooks")}  # fmt: skip
    held.clear()
    held.update({**plain.__dict__, **kept})
    if BASE in held:
        held[BASE] = nn.Linear
        renew_class(module)
    else:
        module.__class__ = nn.Linear


def _unmark(root: nn.Module) -> None:
    """Tell a transformers model that it is quantised no more."""
    for _, module in base_modules(root):
        for name in _MARKS:
            module.__dict__.pop(name, None)
        config = module.__dict__.get("config")
        if config is not None and "quantization_config" in getattr(config, "__dict__", {}):
            del config.quantization_config
