"""Contractions: products with a weight that is viewed, scaled or broadcast first, and those of `einsum` and its kin.

    einsum("bti,ihd->bhtd", x, W)        rows of x (b, t, i), the operator, its delta as (b, h, t, d)
    x @ (W * 0.5), bmm(x, W.expand(...)), tensordot, inner, W.view(h, d, i)

A weight is some dimensions that are summed over, `in`, and the others, `out`: the matrix is the stored weight with its
dimensions in that order. Whatever sums something else, or has one matrix for each entry of a batch, is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from .product import Call, Product


@dataclass(frozen=True)
class Contraction(Product):
    """`y = scale * x W` over some dimensions of the weight.

    Args:
        shape: of the weight as the product has it: a view of the stored one.
        contracted, produced: its dimensions, in the order of `in` and `out`.
        gather: what brings x to `(..., *contracted)`: an equation for einsum, or the dimensions that are moved last;
            empty for nothing.
        spread: the equation that brings `(..., *produced)` to the result's layout; empty for nothing.
        scale: what the weight is multiplied with.
    """

    by_rows: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    shape: tuple[int, ...] = ()
    contracted: tuple[int, ...] = (1,)
    produced: tuple[int, ...] = (0,)
    gather: str | tuple[int, ...] = ""
    spread: str = ""
    scale: float = 1.0

    @property
    def undivided(self) -> str:
        return "what it produces is several dimensions of the result" if len(self.produced) > 1 or self.spread else ""

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.produced, *self.contracted)

    def _sizes(self, dims: tuple[int, ...]) -> list[int]:
        return [self.shape[dim] for dim in dims]

    def matrix(self, weight: Tensor) -> Tensor:
        return as_matrix(weight, self.shape, self._order, len(self.produced))

    def put(self, weight: Tensor, offset: int, rows: Tensor) -> None:
        matrix = self.matrix(weight).clone()
        matrix.narrow(0, offset, rows.shape[0]).copy_(rows)
        weight.view(self.shape).permute(self._order).copy_(matrix.reshape(self._sizes(self._order)))

    def matrix_node(self, call: Call, weight: fx.Node) -> fx.Node:
        return call(as_matrix, weight, self.shape, self._order, len(self.produced))

    def rows(self, call: Call, x: fx.Node) -> fx.Node:
        if isinstance(self.gather, str):
            x = call(torch.einsum, self.gather, x) if self.gather else x
        else:
            x = call(torch.movedim, x, self.gather, tuple(range(-len(self.gather), 0)))
        return call(torch.flatten, x, -len(self.contracted)) if len(self.contracted) > 1 else x

    def unrolled(self, call: Call, delta: fx.Node) -> fx.Node:
        if len(self.produced) > 1:
            delta = call(torch.unflatten, delta, -1, tuple(self._sizes(self.produced)))
        delta = call(torch.einsum, self.spread, delta) if self.spread else delta
        return call(torch.mul, delta, self.scale) if self.scale != 1 else delta


def as_matrix(weight: Tensor, shape: tuple[int, ...], order: tuple[int, ...], produced: int) -> Tensor:
    """The stored weight as `(out, in)`: `shape` its view, `order` its dimensions, the produced ones first."""
    ordered = weight.reshape(shape).permute(order)
    return ordered.flatten(produced).flatten(0, produced - 1)
