"""bitsandbytes: `Linear4bit` (nf4, fp4) and `Linear8bitLt` (LLM.int8())."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError, MergeError
from .storage import Quantised

_KEPT = "fxgraft_unpacked"  # plain attribute of a layer that its forward has packed for a CPU: what it was before


def _functional() -> Any:
    return sys.modules["bitsandbytes.functional"]


def _is(module: nn.Module, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def _packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _own(state: Any) -> Any:
    """A quantisation state of one's own over the same tensors: a forward rewrites some of its fields in place."""
    twin = copy.copy(state)
    if getattr(twin, "state2", None) is not None:
        twin.state2 = copy.copy(twin.state2)
    return twin


def _would_pack(module: Any, x: Tensor) -> bool:
    """Whether the forward of a `Linear4bit` on a CPU packs its weight anew."""
    packs = getattr(module, "support_avx512bf16_for_cpu", False) and not module.training
    return packs and not x.requires_grad and not _packed(module.weight.quant_state)


def _as_in_training(module: Any, x: Tensor) -> Tensor:
    """The product of a `Linear4bit` with its weight as it is."""
    dtype = x.dtype if module.compute_dtype is None else module.compute_dtype
    weight = _functional().dequantize_4bit(module.weight, module.weight.quant_state).to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    return F.linear(x.to(dtype), weight, bias).to(x.dtype)


class FourBit(Quantised):
    """`Linear4bit`: blocks of 4-bit codes, the state of the quantiser on the parameter.

    On some CPUs its first evaluation packs the weight anew, in place, for a kernel that has no gradient and rounds to
    bfloat16. What it was before is kept and put back in training.
    """

    name = "bitsandbytes 4-bit"

    def holds(self, module: nn.Module) -> bool:
        return _is(module, "Linear4bit")

    @staticmethod
    def _state(module: Any) -> Any:
        state = getattr(module.weight, "quant_state", None)
        return module.__dict__.get("quant_state") if state is None else state

    def refusal(self, module: Any) -> str | None:
        if self._state(module) is None:
            return "it is not quantised yet: move the model to its device first, which does it"
        return None

    def dtype(self, module: nn.Module) -> torch.dtype:
        state = self._state(module)
        return state.original_dtype if _packed(state) else state.dtype  # type: ignore[no-any-return]

    def _unpacked(self, module: Any) -> tuple[Tensor, Any]:
        """The weight and its state as they were before a CPU's kernel packed them."""
        data, state = module.weight.data, self._state(module)
        if not _packed(state):
            return data, state
        if (kept := module.__dict__.get(_KEPT)) is not None and kept[0].device == data.device:
            return kept  # type: ignore[no-any-return]
        unpack = getattr(_functional(), "_convert_weight_packed_for_cpu_inverse", None)
        if unpack is None:
            raise AdapterError(
                "a Linear4bit was packed for this CPU by its first evaluation, and this bitsandbytes cannot undo it: "
                "rewrite the model before it has run"
            )
        return unpack(data, _own(state))  # type: ignore[no-any-return]

    @torch.no_grad()
    def weight(self, module: Any) -> Tensor:
        data, state = self._unpacked(module)
        found: Tensor = _functional().dequantize_4bit(data, state)
        return found.detach()

    def share(self, module: Any, memo: dict[int, Any]) -> None:
        state = self._state(module)
        alias = memo.get(id(module.weight))
        if state is None or alias is None:
            return
        twin = memo.setdefault(id(state), _own(state))
        alias.quant_state = twin
        if "module" in alias.__dict__:
            alias.module = None  # the layer that it was quantised in: not this copy's
        if (kept := module.__dict__.get(_KEPT)) is not None:
            memo[id(kept)] = (kept[0], _own(kept[1]))

    def guard(self, module: Any) -> None:
        if getattr(module, "support_avx512bf16_for_cpu", False) and _before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before)

    def release(self, module: Any) -> None:
        module.__dict__.pop(_KEPT, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _before:
                del module._forward_pre_hooks[key]

    def product(self, module: Any, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        x = args[0]
        if x.device.type == "cpu":
            if torch.compiler.is_compiling() and _would_pack(module, x):
                return _as_in_training(module, x)  # no graph can pack
            self._for_this_call(module, x)
        return forward(module, *args)

    def _for_this_call(self, module: Any, x: Tensor) -> None:
        """Put the weight back in training; keep it where the forward is about to pack it."""
        weight = module.weight
        state = weight.quant_state
        if module.training or (x.requires_grad and torch.is_grad_enabled()):
            if _packed(state):
                weight.data, weight.quant_state = self._unpacked(module)
                module.__dict__.pop(_KEPT, None)
        elif _would_pack(module, x):
            module.__dict__[_KEPT] = (weight.data, _own(state))

    def put(self, module: Any, weight: Tensor) -> None:
        data, state = self._unpacked(module)
        kind = type(module.weight)
        fresh = kind(
            weight.to(state.dtype).contiguous(), requires_grad=False, blocksize=state.blocksize,
            compress_statistics=state.nested, quant_type=state.quant_type, quant_storage=data.dtype,
        )  # fmt: skip
        module.weight = fresh.to(data.device)
        module.quant_state = module.weight.quant_state
        module.__dict__.pop(_KEPT, None)


def _before(module: nn.Module, args: Any) -> None:
    """What a grafted layer does for itself, before the forward of one without an adapter."""
    if args and args[0].device.type == "cpu" and not torch.compiler.is_compiling():
        FourBit()._for_this_call(module, args[0])


class EightBit(Quantised):
    """`Linear8bitLt`: rows of int8 with a scale each."""

    name = "bitsandbytes int8"

    def holds(self, module: nn.Module) -> bool:
        return _is(module, "Linear8bitLt")

    def refusal(self, module: Any) -> str | None:
        if module.state.has_fp16_weights:
            return (
                "it keeps its weight in floating point and quantises it at every call (has_fp16_weights=True), which "
                "trains the weight itself: make the layer with has_fp16_weights=False"
            )
        if module.weight.dtype != torch.int8:
            return "it is not quantised yet: move the model to its device first, which does it"
        return None

    def dtype(self, module: nn.Module) -> torch.dtype:
        return torch.float32

    @torch.no_grad()
    def weight(self, module: Any) -> Tensor:
        codes = module.weight.data
        scale = getattr(module.weight, "SCB", None)
        scale = module.state.SCB if scale is None else scale
        return codes.float() * (scale.float().unsqueeze(1) / 127.0)  # type: ignore[no-any-return]

    def share(self, module: Any, memo: dict[int, Any]) -> None:
        for name in ("CB", "SCB"):
            if isinstance(held := getattr(module.state, name, None), Tensor):
                memo[id(held)] = held
        weight = module.weight
        if id(weight) in memo and isinstance(getattr(weight, "SCB", weight), (Tensor, type(None))):
            memo[id(weight)] = type(weight)(
                weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.CB, SCB=weight.SCB
            )

    def put(self, module: Any, weight: Tensor) -> None:
        if module.state.has_fp16_weights:
            raise MergeError("Linear8bitLt with has_fp16_weights keeps a floating weight")
        device = module.weight.device
        fresh = type(module.weight)(weight.to("cpu"), requires_grad=False, has_fp16_weights=False)
        module.weight = fresh.to(device)
        module.state = copy.copy(module.state)
        module.state.CB = module.state.SCB = None
