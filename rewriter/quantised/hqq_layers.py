"""HQQ: `HQQLinear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .storage import Quantised


class HQQ(Quantised):
    """`HQQLinear`: packed codes in `W_q`, scales and zeros in the plain dict `meta`."""

    name = "HQQ"

    def holds(self, module: nn.Module) -> bool:
        return any(c.__name__ == "HQQLinear" and c.__module__.startswith("hqq.") for c in type(module).__mro__)

    def refusal(self, module: Any) -> str | None:
        return None if module.ready else "it is not quantised yet: load or initialise it first"

    def no_gradient(self, module: nn.Module) -> str | None:
        backend = getattr(type(module), "backend", None)
        if backend is not None and "backprop" not in backend.value and backend.value not in _DIFFERENTIABLE:
            return (
                f"its backend {backend.name} has no gradient: HQQLinear.set_backend(HQQBackend.PYTORCH) before the "
                "model is rewritten"
            )
        return None

    def device(self, module: Any) -> torch.device:
        return torch.device(module.W_q.device)

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype  # type: ignore[no-any-return]

    @torch.no_grad()
    def weight(self, module: Any) -> Tensor:
        found: Tensor = module.dequantize()
        return found.detach()

    def share(self, module: Any, memo: dict[int, Any]) -> None:
        tensors = [value for value in _values(module.meta) if isinstance(value, Tensor)]
        for tensor in tensors:
            memo[id(tensor)] = tensor
        bias = module.__dict__.get("bias")
        if isinstance(bias, Tensor):  # of a layer that was a clone of a parameter: it has a history
            memo[id(bias)] = bias.detach()

    def members(self, base: type[nn.Module]) -> dict[str, Any]:
        def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """The layer's own, which knows of no children, and those of its adapters."""
            found = base.state_dict(self, *args, **kwargs)
            into = found if (given := kwargs.get("destination")) is None else given
            prefix, keep = kwargs.get("prefix", ""), kwargs.get("keep_vars", False)
            for name, child in self._modules.items():
                if child is not None:
                    child.state_dict(destination=into, prefix=f"{prefix}{name}.", keep_vars=keep)
            return found

        return {"state_dict": state_dict}

    def put(self, module: Any, weight: Tensor) -> None:
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        config = {**module.quant_config, "offload_meta": module.offload_meta}
        base = next(c for c in type(module).__mro__ if c.__name__ == "HQQLinear")
        fresh: Any = base(plain, config, compute_dtype=module.compute_dtype, device=str(module.device))  # type: ignore[call-arg]
        module.W_q, module.meta = fresh.W_q, fresh.meta


_DIFFERENTIABLE = ("forward_pytorch", "forward_pytorch_compile")


def _values(found: Any) -> list[Any]:
    return [v for value in found.values() for v in (_values(value) if isinstance(value, dict) else [value])]
