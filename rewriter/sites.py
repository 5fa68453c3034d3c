"""Sites: where one adapter goes, and the roles of a weight's dimensions there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .parts import Cut, Rows, put
from .products.linear import Linear
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
        part, cut: which part of the produced dimension, and how that is cut; None for a whole weight.
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
    part: int
    cut: Cut | None
    dtype: torch.dtype
    device: torch.device
    form: str
    host: str | None = None

    def __deepcopy__(self, memo: object) -> Site:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "contracted" in state:  # pickled when every product was linear and all parts of a weight were equal
            state = dict(state)
            state["product"] = Linear(state.pop("contracted"))
            del state["offset"]
            parts = state.pop("parts")
            state["cut"] = None if parts == 1 else Cut((state["out_features"],) * parts)
        self.__dict__.update(state)

    @property
    def experts(self) -> int:
        """How many matrices the weight stacks along its first dimension, of which every row of x takes one; 0 for a
        weight that is one matrix. Sizes are those of one matrix."""
        return self.product.experts

    @property
    def whole(self) -> bool:
        return self.cut is None

    @property
    def parts(self) -> int:
        return 1 if self.cut is None else len(self.cut.sizes)

    @property
    def rows(self) -> Rows | None:
        """Where the part's rows lie in the produced dimension; None for all of them."""
        return None if self.cut is None else self.cut.rows(self.part)

    @property
    def plain_cut(self) -> tuple[int, ...]:
        """How the weight is cut, where the number of parts does not say it; empty for a whole weight too."""
        return () if self.cut is None else self.cut.plain

    @property
    def offset(self) -> int:
        return 0 if self.rows is None else self.rows.start

    @property
    def stem(self) -> str:
        """The weight's name, without the part."""
        return self.name if self.cut is None else self.name.rpartition("[")[0]

    @property
    def answers(self) -> tuple[str, ...]:
        """The names that patterns find it by: its own, its weight's, and what a model with a layer of its own for the
        part would call that, the usual one first."""
        if self.cut is None:
            return (self.name,)
        names = self.cut.names[self.part] if self.cut.names else ()
        return (self.name, self.stem, *(beside(self.stem, name) for name in names))

    @property
    def alias(self) -> str | None:
        """The first of the names that a layer of its own would have."""
        return self.answers[2] if len(self.answers) > 2 else None

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
        """This site's part of the stored weight as `(out, in)`: a view where the weight's memory and its rows allow.

        `(E, out, in)` where it stacks the matrices of experts.
        """
        return self.take(self.product.matrix(weight), -2)

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """This site's rows of a tensor whose dimension `dim` is the produced one."""
        return tensor if self.rows is None else self.rows.take(tensor, dim)

    def put(self, weight: Tensor, values: Tensor) -> None:
        """Write `(out, in)` into this site's part of the stored weight."""
        if self.rows is not None and self.rows.groups > 1:
            matrix = self.product.matrix(weight).clone()
            put(self.rows, matrix, values, -2)
            self.product.put(weight, 0, matrix)
        else:
            self.product.put(weight, self.offset, values)

    def put_bias(self, bias: Tensor, values: Tensor) -> None:
        """Write `(out,)` into this site's part of the bias."""
        put(self.rows, bias, values, -1)

    def produced(self, weight: Tensor) -> int:
        """How many features the whole weight produces."""
        return self.product.matrix(weight).shape[-2]


def beside(stem: str, name: str) -> str:
    """The dotted name of a sibling."""
    return f"{stem.rpartition('.')[0]}.{name}".lstrip(".")


def cut_differently(sites: Iterable[Site]) -> str:
    """What is said where sites of several adapters are parts of one weight that is not cut in one way; else empty."""
    cuts: dict[tuple[str, str], Site] = {}
    for site in sites:
        other = cuts.setdefault((site.owner, site.weight), site)
        if other.cut != site.cut:
            return f"the adapters cut one weight differently: {_cut(other)} and {_cut(site)}"
    return ""


def _cut(site: Site) -> str:
    return f"{site.name!r} into {'1 part' if site.cut is None else site.cut}"
