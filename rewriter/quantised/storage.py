"""What is asked of a quantised linear layer: its sizes, its weight in floating point, and its own product.

    y = base.forward(x)  ->  y = base.forward(x) + fxgraft::<method>(x, ...)

Such a layer is opaque: its forward is not traced, as it may rewrite its own weight, and stands in the owner's graph as
one call. What needs the numbers of the weight (LoRA-XS' singular vectors, merging, exporting) gets them dequantised.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MergeError


class Quantised(abc.ABC):
    """One way of storing the weight of a linear layer `(out, in)`. One instance serves all layers; it keeps nothing."""

    #: how messages call it
    name: ClassVar[str]

    @abc.abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a module is a linear layer that is stored this way."""

    @abc.abstractmethod
    def weight(self, module: nn.Module) -> Tensor:
        """The weight in floating point, `(out, in)`: a new tensor without gradient."""

    @abc.abstractmethod
    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of `weight`, without computing it."""

    def size(self, module: Any) -> tuple[int, int]:
        """`(out, in)`."""
        return int(module.out_features), int(module.in_features)

    def device(self, module: nn.Module) -> torch.device:
        """Where its weight is."""
        weight: Any = module.weight
        return torch.device(weight.device)

    def refusal(self, module: nn.Module) -> str | None:
        """Why no adapter can go beside this layer."""
        return None

    def no_gradient(self, module: nn.Module) -> str | None:
        """Why its forward has no gradient for its input, so that nothing before it can be trained."""
        return None

    def share(self, module: nn.Module, memo: dict[int, Any]) -> None:
        """Note in the memo of a deep copy what the copy of a module shares with it: all that no forward writes."""
        memo.update({id(buffer): buffer for buffer in module._buffers.values() if buffer is not None})

    def guard(self, module: nn.Module) -> None:
        """Keep a layer of a copy, with an adapter or without, from losing the gradient of its input."""
        return

    def release(self, module: nn.Module) -> None:
        """Undo `guard`."""
        return

    def product(self, module: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """The layer's own forward, kept from doing what would change its gradients."""
        return forward(module, *args)

    def members(self, base: type[nn.Module]) -> dict[str, Any]:
        """What the class of a grafted layer has instead of the base's."""
        return {}

    def put(self, module: nn.Module, weight: Tensor) -> None:
        """Quantise a weight as the layer's is, and let the layer have it; the memory it had is not written.

        Raises:
            MergeError: it cannot be.
        """
        raise MergeError(f"{self.name} layers cannot be quantised again: merge into floating point, merge(dtype=...)")


def base_product(module: Any, x: Tensor) -> Tensor:
    """The product of a layer with these rows, without its bias, and without its adapters where it has some."""
    was = module.__dict__["training"]
    base = module.__dict__.get("fxgraft_base") or type(module)  # `grafted_class.BASE`, which imports this
    module.__dict__["training"] = False
    try:
        with torch.no_grad():
            product: Tensor = base.forward(module, x)
    finally:
        module.__dict__["training"] = was
    bias = getattr(module, "bias", None)
    return product if bias is None else product - bias.detach().to(product.dtype)


def by_identity(module: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight that a layer multiplies with, read off its product with the identity."""
    return base_product(module, torch.eye(module.in_features, dtype=dtype, device=device)).t().contiguous()


def is_product_of(module: Any, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a layer's product is that of this weight, on a few rows, as near as half precision tells."""
    if tuple(weight.shape) != (module.out_features, module.in_features):
        return False
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    given, wanted = base_product(module, x).float(), F.linear(x.float(), weight.float())
    return bool((given - wanted).norm() <= 0.02 * wanted.norm() + 1e-6)
