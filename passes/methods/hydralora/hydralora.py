"""HydraLoRA: one A, N experts B, a router per site (arXiv 2404.19245, section 3.2).

`y += (alpha / r) * sum_i w_i(x) B_i A dropout(x)` with `w = softmax(x Wg^T)` per token. The experts are not looped
over: with the experts' B one under the other, the sum is ONE product of `w (x) z`, the N * r numbers `w_i z_j`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....rewriter.config_checks import check_dropout, check_positive, check_positive_int, check_rank, lower_rank
from ....rewriter.dialect import Halves, Traits, cast, operator
from ....rewriter.emitter import Emitter
from ....rewriter.errors import SpecError
from ....rewriter.method import Decl, Declaration, InitContext, Method, Tensors
from ....rewriter.sites import Site

_INPUT_DEPENDENT = (
    "its router weighs the experts anew for every token, so no single weight gives its output. Serve it unmerged: "
    "compile or export the adapted model as it is (ONNX adapters='swappable' keeps its tensors exchangeable); for an "
    "adapter that merges, train LoRA or PRoLoRA"
)


def _combine(z: Tensor, logits: Tensor, B: Tensor, scale: float) -> Tensor:
    """z `(..., 1 | N, r)`, logits `(..., N)`, B `(N * r, out)` -> `(..., out)`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    w = (logits.softmax(-1, dtype=wide) * scale).to(logits.dtype)  # (..., N): the scale costs least here
    # B lies (N * r, out): the gradient of the transposed layout is the slowest product of a step on CPU
    return torch.matmul((w.unsqueeze(-1) * z).flatten(-2), cast(B, logits))


def routed_down(A: Tensor, router: Tensor, B: Tensor, scale: float) -> Tensor:
    """A and the router one under the other, `(r + N, in)`."""
    return torch.cat([A, router])


def routed_up(z: Tensor, A: Tensor, router: Tensor, B: Tensor, scale: float) -> Tensor:
    """Route and combine: z `(..., r + N)` -> `(..., out)`."""
    z, logits = z.split([A.shape[0], router.shape[0]], -1)
    return _combine(z.unsqueeze(-2), logits, B, scale)


@operator(
    "hydralora(Tensor x, Tensor dropped, Tensor A, Tensor router, Tensor B, float scale) -> Tensor",
    Traits(Halves(routed_down, routed_up, inputs=2)),
)
def hydralora(x: Tensor, dropped: Tensor, A: Tensor, router: Tensor, B: Tensor, scale: float) -> Tensor:
    """`scale * sum_i softmax(x router^T)_i * (dropped A^T) B_i`.

    x `(..., in)`; dropped: x after dropout, `(..., in)`, or `(N, ..., in)` with a mask for each expert; A `(r, in)`;
    router `(N, in)`; B `(N * r, out)`, rows `i * r` to `(i + 1) * r` are expert i -> `(..., out)` in x's dtype. The
    softmax is float32 (float64 for float64 inputs).
    """
    if dropped is x:  # no dropout, or not training: one product reads x once for A and the router
        return routed_up(F.linear(x, routed_down(A, router, B, scale).to(x.dtype)), A, router, B, scale)
    z, logits = F.linear(dropped, cast(A, x)), F.linear(x, cast(router, x))
    return _combine(z.unsqueeze(-2) if dropped.dim() == x.dim() else z.movedim(0, -2), logits, B, scale)


def expert_dropout(x: Tensor, p: float, training: bool, experts: int) -> Tensor:
    """`(experts, ..., in)`: a dropout mask of its own for each expert; x itself when not training."""
    return F.dropout(x.expand(experts, *x.shape), p, True) if training else x


@dataclass(frozen=True)
class HydraLoRA(Method, key="hydralora"):
    """HydraLoRA (arXiv 2404.19245).

    Args:
        rank: `r`, of use up to `min(in, out)` of a site.
        experts: `N`, from 2 up; `suggest_experts` proposes one from the training texts.
        alpha: the delta is scaled by `alpha / rank`.
        dropout: probability, on the input of A (not of the router), in training only.
        per_expert_dropout: draw the mask anew for each expert, as the authors' code does, instead of once. It costs N
            masks and N copies of the input kept for the backward pass, and A's product N times, in training only.

    Tensors per site, all trained: `A (r, in)` and `router (N, in)` uniform in ±1/sqrt(in), `B (N * r, out)` zero,
    the experts one under the other, each transposed: `B_i = B[i * r : (i + 1) * r].T`. Starts as a no-op.

    Raises:
        SpecError: a value outside its range.
    """

    unmergeable: ClassVar[str | None] = _INPUT_DEPENDENT
    not_low_rank: ClassVar[str | None] = _INPUT_DEPENDENT
    elsewhere: ClassVar[Mapping[str, str]] = {"lora_nums": "experts", "num_experts": "experts"}
    free: ClassVar[tuple[str, ...]] = ("dropout", "per_expert_dropout")

    rank: int = 4
    experts: int = 3
    alpha: float = 32
    dropout: float = 0.0
    per_expert_dropout: bool = False

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank, experts=self.experts)
        if self.experts < 2:
            raise SpecError(f"HydraLoRA(experts={self.experts}): one expert needs no router; use LoRA, or 2 and up")
        check_positive(self, alpha=self.alpha)
        check_dropout(self, self.dropout)
        if not isinstance(self.per_expert_dropout, bool):
            raise SpecError(f"HydraLoRA(per_expert_dropout={self.per_expert_dropout!r}): allowed are True and False")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def fitted(self, out_features: int, in_features: int) -> HydraLoRA:
        return lower_rank(self, out_features, in_features)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        check_rank(self, self.rank, sites)
        return Declaration(
            [
                {
                    "A": Decl((self.rank, s.in_features)),
                    "router": Decl((self.experts, s.in_features)),
                    "B": Decl((self.experts * self.rank, s.out_features)),
                }
                for s in sites
            ]
        )

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for tensors in local:
            torch.nn.init.kaiming_uniform_(tensors["A"], a=math.sqrt(5))
            torch.nn.init.kaiming_uniform_(tensors["router"], a=math.sqrt(5))
            tensors["B"].zero_()

    def emit(self, e: Emitter) -> fx.Node:
        if self.dropout and self.per_expert_dropout:
            dropped = e.call(expert_dropout, e.x, self.dropout, e.training(), self.experts)
        else:
            dropped = e.dropped(self.dropout)
        return e.add(e.call(hydralora, e.x, dropped, e.tensor("A"), e.tensor("router"), e.tensor("B"), self.scale))
