"""LoRA: `y += (alpha / r) B A dropout(x)` (Hu et al., arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...rewriter.config_checks import check_dropout, check_positive, check_positive_int, check_rank, lower_rank
from ...rewriter.dialect import Halves, Traits, cast, operator
from ...rewriter.emitter import Emitter
from ...rewriter.method import Decl, Declaration, InitContext, Method, Tensors
from ...rewriter.sites import Site

_MANY = 128  # rows from which a transposed copy of B pays


def expand(z: Tensor, B: Tensor) -> Tensor:
    """`z B^T`: z `(..., r)`, B `(out, r)` -> `(..., out)`.

    In training on many rows through a transposed copy of B: on a CPU the gradients that flow through a column-major
    `B^T` cost up to twice the whole product's, the copy some ten microseconds.
    """
    if (z.requires_grad or B.requires_grad) and torch.is_grad_enabled():
        rows = z.numel() // B.shape[1]
        if isinstance(rows, torch.SymInt) or rows >= _MANY:  # a symbolic size must not be guarded on
            return F.linear(z, B.t().contiguous().t())
    return F.linear(z, B)


def lora_down(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`A (r, in)`."""
    return A


def lora_across(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`scale * B (out, r)`."""
    return B if scale == 1 else B * scale


def lora_up(z: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`scale * z B^T`."""
    return expand(z * scale, cast(B, z))


@operator(
    "lora(Tensor x, Tensor A, Tensor B, float scale) -> Tensor",
    Traits(Halves(lora_down, lora_up, lora_across)),
)
def lora(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`scale * x A^T B^T`: x `(..., in)`, A `(r, in)`, B `(out, r)` -> `(..., out)` in x's dtype."""
    z = F.linear(x, cast(A, x)) * scale  # scaled where it is smallest: z is (..., r)
    return expand(z, cast(B, x))


@dataclass(frozen=True)
class LoRA(Method, key="lora"):
    """LoRA (arXiv 2106.09685).

    Args:
        rank: `r`, of use up to `min(in, out)` of a site.
        alpha: the delta is scaled by `alpha / rank`.
        dropout: probability, on the adapter's input, in training only.
        rslora: scale by `alpha / sqrt(rank)` instead (rank-stabilised LoRA, arXiv 2312.03732, section 3).

    Tensors per site: `A (rank, in)` uniform in ±1/sqrt(in), `B (out, rank)` zero; both train. Starts as a no-op. In an
    embedding A is zero and B normal, as in the authors' code.

    Raises:
        SpecError: a value outside its range.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank)
        check_positive(self, alpha=self.alpha)
        check_dropout(self, self.dropout)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def meaning(self) -> dict[str, Any]:
        return {"rank": self.rank, "the scale": self.scale}

    def fitted(self, out_features: int, in_features: int) -> LoRA:
        return lower_rank(self, out_features, in_features)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        check_rank(self, self.rank, sites)
        return Declaration(
            [{"A": Decl((self.rank, s.in_features)), "B": Decl((s.out_features, self.rank))} for s in sites]
        )

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for site, tensors in zip(sites, local, strict=True):
            if site.product.one_hot:  # no sum over `in` that a bound of 1/sqrt(in) would be for: the authors' embedding
                tensors["A"].zero_()
                torch.nn.init.normal_(tensors["B"])
                continue
            torch.nn.init.kaiming_uniform_(tensors["A"], a=math.sqrt(5))
            tensors["B"].zero_()

    def emit(self, e: Emitter) -> fx.Node:
        return e.add(e.call(lora, e.dropped(self.dropout), e.tensor("A"), e.tensor("B"), self.scale))

    def unscaled(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor, float]:
        return local["A"], local["B"], self.scale

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        return local["A"], local["B"] * self.scale
