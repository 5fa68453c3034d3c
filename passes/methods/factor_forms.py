"""Low-rank factors as inputs of a graph: `y += (x A) B` as two plain products, for one adapter or a stack of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...rewriter.emitter import Emitter
from ...rewriter.method import ADAPTER_IDS, Method, OpenForm, Tensors
from .by_sample import by_rows


def by_sample(x: Tensor, ids: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of x as `(batch, tokens, in)`, the result `(batch, tokens, out)` in the shape of x.

    x `(batch, ..., in)`, or `(batch * tokens, in)`. The usual shapes cost no reshape in a graph.
    """
    aligned = x.dim() in (2, 3) and statically_known_true(x.shape[0] == ids.shape[0])
    if aligned and x.dim() == 3:
        return function(x)
    if aligned:
        return function(x.unsqueeze(1)).squeeze(1)
    y = function(x.reshape(ids.shape[0], -1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class Factors(OpenForm, key="factors"):
    """The form exports use: `A (in, r)`, `B (r, out)`, stored so that a graph needs no transpose."""

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"A": ("in", "rank"), "B": ("rank", "out")}

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        A, B = method.factors(shared, local)
        return {"A": A.t(), "B": B.t()}

    @classmethod
    def grown(cls, tensors: Tensors, step: int) -> dict[str, Tensor]:
        # Zero columns change nothing but the rank.
        return {"A": F.pad(tensors["A"], (0, step)), "B": F.pad(tensors["B"], (0, 0, 0, step))}

    def emit(self, e: Emitter) -> fx.Node:
        return e.add(e.call(torch.matmul, e.call(torch.matmul, e.x, e.tensor("A")), e.tensor("B")))

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        return local["A"].t(), local["B"].t()


def stacked_factors(x: Tensor, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`(x_i A[ids_i]) B[ids_i]` for every sample i: A `(K, in, r)`, B `(K, r, out)`, ids `(batch,)` below K."""
    chosen_a, chosen_b = A.index_select(0, ids), B.index_select(0, ids)
    return by_sample(x, ids, lambda rows: torch.matmul(torch.matmul(rows, chosen_a), chosen_b))


@dataclass(frozen=True)
class FactorsBank(OpenForm, key="factors_bank"):
    """A stack of factors: `A (K, in, r)`, `B (K, r, out)`, and the slot of every sample."""

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"A": ("slots", "in", "rank"), "B": ("slots", "rank", "out")}
    inputs: ClassVar[tuple[str, ...]] = (ADAPTER_IDS,)
    not_low_rank: ClassVar[str | None] = "it holds several adapters"

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        return dict(local)

    @classmethod
    def grown(cls, tensors: Tensors, step: int) -> dict[str, Tensor]:
        return {
            "A": F.pad(tensors["A"], (0, step, 0, 0, 0, step)),
            "B": F.pad(tensors["B"], (0, 0, 0, step, 0, step)),
        }

    def emit(self, e: Emitter) -> fx.Node:
        return by_rows(e, stacked_factors, e.tensor("A"), e.tensor("B"))
