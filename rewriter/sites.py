"""Sites: where one adapter goes, and the roles of a weight's dimensions there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .products.product import NoMatch, Product

__all__ = ["NoMatch", "Site"]


@dataclass(frozen=True)
class Site:
    """Where one adapter goes: a whole weight, or one part of a fused one.

    Args:
        name: dotted name in the model: the owner's path, plus the weight's name unless that is `weight`, plus
            `[i]` for part i of a fused weight.
        owner: dotted path of the module that owns the weight; empty for the root.
        weight: the weight's attribute name in the owner.
        bias: the bias' attribute name, or None.
        in_features, out_features: lengths of the contracted and the produced dimension (of the part).
        product: how the model multiplies with the weight.
        offset: where the part starts in the produced dimension; 0 for a whole weight.
        part, parts: which of how many equal parts of the produced dimension; `0, 1` is the whole weight.
        dtype, device: of the weight.
        form: how the model writes the product.
        host: dotted path of the module above the owner that computes the product with the owner's weight, which it
            reads; None where the owner does so itself.
    """

    name: str
    owner: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    product: Product
    offset: int
    part: int
    parts: int
    dtype: torch.dtype
    device: torch.device
    form: str
    host: str | None = None

    def __deepcopy__(self, memo: object) -> Site:
        return self

    @property
    def experts(self) -> int:
        """How many matrices the weight stacks along its first dimension, of which every row of x takes one; 0 for a
        weight that is one matrix. Sizes are those of one matrix."""
        return self.product.experts

    @property
    def whole(self) -> bool:
        return self.parts == 1

    @property
    def key(self) -> str:
        """The site's name inside its owner: empty for the whole of a parameter called `weight`."""
        stem = "" if self.weight == "weight" else self.weight.replace(".", "_")
        return stem if self.whole else f"{stem}part{self.part}"

    @property
    def computed(self) -> str:
        """The path of the module whose forward has the product."""
        return self.owner if self.host is None else self.host

    @property
    def within(self) -> str:
        """The owner's path from its host on; empty without one."""
        return "" if self.host is None else self.owner[len(self.host) + 1 if self.host else 0 :]

    def at_host(self) -> Site:
        """The site as the graph of the host names it."""
        if self.host is None:
            return self
        bias = None if self.bias is None else f"{self.within}.{self.bias}"
        return replace(self, weight=f"{self.within}.{self.weight}", bias=bias)

    def linear_layout(self, weight: Tensor) -> Tensor:
        """This site's part of the stored weight as `(out, in)`: a view where the weight's memory allows.

        `(E, out, in)` where it stacks the matrices of experts.
        """
        return self.product.matrix(weight).narrow(-2, self.offset, self.out_features)

    def put(self, weight: Tensor, values: Tensor) -> None:
        """Write `(out, in)` into this site's part of the stored weight."""
        self.product.put(weight, self.offset, values)

    def produced(self, weight: Tensor) -> int:
        """How many features the whole weight produces."""
        return self.product.matrix(weight).shape[-2]
