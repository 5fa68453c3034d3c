"""Experts: products with the matrices that one parameter stacks, of which every row takes its own.

    y_i = x_i W[e_i]^T

The forward that computes them is no graph (`expert_weights.py`); adapters are put beside its products while it runs
(`experts_forward.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from .linear import Linear
from .product import Call, Product


@dataclass(frozen=True)
class Experts(Product):
    """The products with the matrices of a stack, `(E, out, in)` or `(E, in, out)`, of which a row of x takes one.

    Args:
        contracted: which dimension of one matrix is summed over: 1 for `(out, in)`, 0 for `(in, out)`.
        experts: how many matrices there are.
    """

    plain: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    contracted: int = 1
    experts: int = 1  # type: ignore[misc]

    def matrix(self, weight: Tensor) -> Tensor:
        return weight if self.contracted == 1 else weight.mT

    def matrix_node(self, call: Call, weight: fx.Node) -> fx.Node:
        raise NotImplementedError

    def one(self) -> Product:
        """The product with one of the matrices."""
        return Linear(contracted=self.contracted)


@dataclass(frozen=True)
class Stacked:
    """What is found of a parameter that stacks matrices: like `ProductNode`, without a node."""

    product: Experts
    bias_name: None = None
    form: str = "experts"
    host: None = None
