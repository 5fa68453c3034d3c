"""torchao: an `nn.Linear` whose weight is a tensor of a class of torchao's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .storage import Quantised, by_identity

_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "input_quant_func", "act_quant_scale")


class TorchAO(Quantised):
    """Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor and the other weight-only classes of `quantize_`."""

    name = "torchao"

    def holds(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return isinstance(module, nn.Linear) and type(weight).__module__.startswith("torchao.")

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype  # type: ignore[no-any-return]

    def no_gradient(self, module: nn.Module) -> str | None:
        weight = module._parameters["weight"]
        if any(getattr(weight, name, None) is not None for name in _ACTIVATIONS):
            return (
                f"its {type(weight).__name__} quantises the activations too, and has no gradient for its input: "
                "quantise with a weight-only config"
            )
        return None

    @torch.no_grad()
    def weight(self, module: Any) -> Tensor:
        weight = module.weight.detach()
        inner = getattr(weight, "original_weight_tensor", weight)
        if _beside(weight):
            return by_identity(module, weight.dtype, weight.device)
        for read in ("dequantize", "get_original_weight"):
            if callable(method := getattr(type(inner), read, None)):
                try:
                    found: Tensor = method(inner)
                except (NotImplementedError, RuntimeError):  # what torch gives where a layout has no such operator
                    continue
                return found.detach()
        return by_identity(module, weight.dtype, weight.device)

    def put(self, module: Any, weight: Tensor) -> None:
        held = module.weight
        fresh = _again(held, weight.to(held.dtype))
        module.weight = nn.Parameter(fresh, requires_grad=False)


def _beside(held: Any) -> bool:
    """Whether an Int8Tensor has what its `dequantize` and `from_hp` leave out: zero points, a scale of the input."""
    if type(held).__name__ != "Int8Tensor":
        return False
    zero = getattr(held, "zero_point", None)
    return getattr(held, "act_pre_scale", None) is not None or (zero is not None and bool(zero.any()))


def _again(held: Any, weight: Tensor) -> Tensor:
    """A weight in the class and with the settings of one that was quantised before."""
    kind, lengths = type(held).__name__, tuple(weight.shape)
    if _beside(held) or any(getattr(held, name, None) is not None for name in _ACTIVATIONS):
        kind = f"{kind} with settings of its own for inputs or zero points"
    if kind == "Int8Tensor":
        return type(held).from_hp(weight, _granularity(tuple(held.block_size), lengths))  # type: ignore[no-any-return]
    if kind == "IntxUnpackedToInt8Tensor" and not held.zero_point.any():
        return type(held).from_hp(weight, held.block_size, held.target_dtype)  # type: ignore[no-any-return]
    if kind == "Float8Tensor":
        block = tuple(a // b for a, b in zip(lengths, held.scale.shape, strict=True))
        granularity = _granularity(block, lengths)
        return type(held).from_hp(weight, float8_dtype=held.qdata.dtype, granularity=granularity)  # type: ignore[no-any-return]
    raise MergeError(
        f"a weight of torchao's {kind} cannot be quantised again as it was: merge into floating point, "
        "merge(dtype=...), and call quantize_ with your config on the result"
    )


def _granularity(block: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
    known = sys.modules["torchao.quantization"]
    if block == lengths:
        return known.PerTensor()
    if block == (1, lengths[1]):
        return known.PerRow()
    if block[0] == 1:
        return known.PerGroup(block[1])
    raise MergeError(f"a torchao weight in blocks of {block} cannot be quantised again: merge(dtype=...) instead")
