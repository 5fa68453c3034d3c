"""GPTQ's and AWQ's layers, whatever package they come from: packed codes in `qweight`, scales in `scales`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .storage import Quantised, by_identity, is_product_of

_LAYOUT = "fxgraft_layout"  # plain attribute of a layer: how its weight is read


class Packed(Quantised):
    """A layer with `in_features`, `out_features`, whole numbers in `qweight` and floating `scales`.

    Its weight is what its `dequantize_weight()` gives, or else read off its own product.
    """

    name = "GPTQ or AWQ"

    def holds(self, module: nn.Module) -> bool:
        held = {**module._buffers, **module._parameters}
        codes, scales = held.get("qweight"), held.get("scales")
        return (
            codes is not None
            and scales is not None
            and not codes.is_floating_point()
            and scales.is_floating_point()
            and isinstance(getattr(module, "in_features", None), int)
            and isinstance(getattr(module, "out_features", None), int)
        )

    def device(self, module: Any) -> torch.device:
        return torch.device(module.qweight.device)

    def dtype(self, module: Any) -> torch.dtype:
        return module.scales.dtype  # type: ignore[no-any-return]

    @torch.no_grad()
    def weight(self, module: Any) -> Tensor:
        read, layout = getattr(module, "dequantize_weight", None), module.__dict__.get(_LAYOUT)
        if layout is None:
            layout = module.__dict__[_LAYOUT] = self._layout(module, read)
        if layout == "product":
            return by_identity(module, self.dtype(module), self.device(module))
        found: Tensor = read().detach()  # type: ignore[misc]
        return found.t() if layout == "(in, out)" else found

    def _layout(self, module: Any, read: Any) -> str:
        """How its weight is read; proved on its product, as layouts differ from package to package."""
        dtype = self.dtype(module)
        if callable(read):
            found: Tensor = read().detach()
            for layout, weight in (("(in, out)", found.t()), ("(out, in)", found)):  # GPTQ's are the first
                if is_product_of(module, weight, dtype):
                    return layout
        if is_product_of(module, by_identity(module, dtype, self.device(module)), dtype):
            return "product"
        raise AdapterError(
            f"the weight of a {type(module).__name__} cannot be read: its product is not linear, or not that of what "
            "it dequantises to. Dequantise the model with its own package first"
        )
