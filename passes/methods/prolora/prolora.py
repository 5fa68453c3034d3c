"""PRoLoRA: LoRA whose factors repeat a small chunk, rotated along the rank (arXiv 2402.16902, sections 3.1 to 3.4).

Of the `r` ranks, `u` are plain LoRA and `q = r - u` are shared inside the layer: A is `m` copies of one chunk side by
side, copy k with row j taken from row `(j + k * sA) mod q`, cut to the layer's width; B likewise along its output. The
strides are those of the authors' code, `sA = max(q // m, 1)` and `sB = max(q // n, 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....rewriter.config_checks import check_dropout, check_positive, check_positive_int, check_rank, lower_rank
from ....rewriter.dialect import Halves, Traits, operator, product_with
from ....rewriter.emitter import Emitter
from ....rewriter.errors import SpecError
from ....rewriter.method import Decl, Declaration, InitContext, Method, Tensors
from ....rewriter.sites import Site
from .rotated_chunks import chunked_a, chunked_b, chunks_are_cheaper, expand, rotation


def expanded_down(
    A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None, B_unshared: Tensor | None,
    rows_a: Tensor | None, rows_b: Tensor | None, in_features: int, out_features: int, scale: float,
) -> Tensor:  # fmt: skip
    """`A (r, in)`, shared ranks first."""
    if A_shared is None or rows_a is None:
        assert A_unshared is not None, "rank 0"
        return A_unshared
    A = expand(A_shared, rows_a, in_features)
    return A if A_unshared is None else torch.cat([A, A_unshared])


def expanded_across(
    A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None, B_unshared: Tensor | None,
    rows_a: Tensor | None, rows_b: Tensor | None, in_features: int, out_features: int, scale: float,
) -> Tensor:  # fmt: skip
    """`scale * B (out, r)`, a view of the transposed expansion."""
    if B_shared is None or rows_b is None:
        assert B_unshared is not None, "rank 0"
        return B_unshared * scale
    B = expand(B_shared.t(), rows_b, out_features)
    return ((B if B_unshared is None else torch.cat([B, B_unshared.t()])) * scale).t()


@operator(
    "prolora(Tensor x, Tensor? A_shared, Tensor? A_unshared, Tensor? B_shared, Tensor? B_unshared, "
    "Tensor? rows_a, Tensor? rows_b, int in_features, int out_features, float scale) -> Tensor",
    Traits(Halves(expanded_down, product_with(expanded_across), expanded_across)),
)
def prolora(
    x: Tensor, A_shared: Tensor | None, A_unshared: Tensor | None, B_shared: Tensor | None, B_unshared: Tensor | None,
    rows_a: Tensor | None, rows_b: Tensor | None, in_features: int, out_features: int, scale: float,
) -> Tensor:  # fmt: skip
    """`scale * x A^T B^T` with A and B as the module says.

    x `(..., in)`; A_shared `(q, ceil(in/m))`, A_unshared `(u, in)`, B_shared `(ceil(out/n), q)`, B_unshared `(out, u)`;
    rows_a `(q, m)` and rows_b `(q, n)` int64 from `rotation`; the tensors of an absent kind are None -> `(..., out)` in
    x's dtype.
    """
    dtype, width = x.dtype, x.shape[-1]
    if A_shared is None or B_shared is None or rows_a is None or rows_b is None:
        assert A_unshared is not None and B_unshared is not None, "rank 0"
        return F.linear(F.linear(x, A_unshared.to(dtype)) * scale, B_unshared.to(dtype))
    tokens = math.prod(x.shape[:-1])
    A0, Au = A_shared.to(dtype), None if A_unshared is None else A_unshared.to(dtype)
    B0, Bu = B_shared.to(dtype), None if B_unshared is None else B_unshared.to(dtype)
    shared = A0.shape[0]
    if chunks_are_cheaper(tokens, width, rows_a):
        z = chunked_a(x, A0, rows_a)
        z = z if Au is None else torch.cat([z, F.linear(x, Au)], -1)
    else:
        A = expand(A0, rows_a, width)
        z = F.linear(x, A if Au is None else torch.cat([A, Au]))
    z = z * scale  # scaled where it is smallest
    if chunks_are_cheaper(tokens, out_features, rows_b):
        y = chunked_b(z[..., :shared], B0, rows_b, out_features)
        return y if Bu is None else y + F.linear(z[..., shared:], Bu)
    B = expand(B0.t(), rows_b, out_features)
    # B lies (r, out) here: the gradient of the transposed layout is the slowest product of a step on CPU
    return torch.matmul(z, B if Bu is None else torch.cat([B, Bu.t()]))


@dataclass(frozen=True)
class PRoLoRA(Method, key="prolora"):
    """PRoLoRA (arXiv 2402.16902).

    Args:
        rank: `r`, of use up to `min(in, out)` of a site.
        unshared: `u`, how many of the ranks are plain LoRA; from 0 to `rank` (then it is LoRA).
        a_chunks, b_chunks: `m` and `n`, how often A's and B's chunk is repeated; they need not divide the dimension.
        alpha: the delta is scaled by `alpha / rank`, with the full rank.
        dropout: probability, on the adapter's input, in training only.

    Tensors per site, all trained: `A_shared (q, ceil(in/m))`, `A_unshared (u, in)`, both uniform in ±1/sqrt(in) with
    the full `in` (the paper's rectified initialisation: a chunk must not start larger because it is narrower), and
    `B_shared (ceil(out/n), q)`, `B_unshared (out, u)`, zero; `q = rank - unshared`, tensors without elements are left
    out. Derived: `rows_a (q, m)`, `rows_b (q, n)`, int64; `lengths (2,)`, int64, in and out. Starts as a no-op.

    Raises:
        SpecError: a value outside its range.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {"unshared_rank": "unshared"}

    rank: int = 8
    unshared: int = 1
    a_chunks: int = 7
    b_chunks: int = 7
    alpha: float = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank, a_chunks=self.a_chunks, b_chunks=self.b_chunks)
        if isinstance(self.unshared, bool) or not isinstance(self.unshared, int) or not 0 <= self.unshared <= self.rank:
            raise SpecError(
                f"PRoLoRA(unshared={self.unshared!r}, rank={self.rank}): allowed are whole numbers from 0 to the rank"
            )
        check_positive(self, alpha=self.alpha)
        check_dropout(self, self.dropout)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shared(self) -> int:
        """`q`, how many ranks are shared."""
        return self.rank - self.unshared

    def fitted(self, out_features: int, in_features: int) -> PRoLoRA:
        fitted = lower_rank(replace(self, unshared=0), out_features, in_features)
        a_chunks, b_chunks = min(self.a_chunks, in_features), min(self.b_chunks, out_features)
        return replace(fitted, unshared=min(self.unshared, fitted.rank), a_chunks=a_chunks, b_chunks=b_chunks)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        check_rank(self, self.rank, sites)
        q, u, local = self.shared, self.unshared, []
        for s in sites:
            for field, chunks, length in (
                ("a_chunks", self.a_chunks, s.in_features),
                ("b_chunks", self.b_chunks, s.out_features),
            ):
                if q and chunks > length:
                    raise SpecError(
                        f"PRoLoRA({field}={chunks}): site {s.name!r} is {s.out_features} x {s.in_features} (out x in) "
                        f"and cannot be cut into more than {length} chunks there; lower it or give an override"
                    )
            decls: dict[str, Decl] = {}
            if q:
                decls["A_shared"] = Decl((q, -(-s.in_features // self.a_chunks)))
            if u:
                decls["A_unshared"] = Decl((u, s.in_features))
            if q:
                decls["B_shared"] = Decl((-(-s.out_features // self.b_chunks), q))
            if u:
                decls["B_unshared"] = Decl((s.out_features, u))
            if q:
                decls["rows_a"] = Decl((q, self.a_chunks), "derived", torch.int64)
                decls["rows_b"] = Decl((q, self.b_chunks), "derived", torch.int64)
                decls["lengths"] = Decl((2,), "derived", torch.int64)
            local.append(decls)
        return Declaration(local)

    def derive(self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
        if self.shared == 0:
            return
        rows_a, rows_b = rotation(self.shared, self.a_chunks), rotation(self.shared, self.b_chunks)
        for site, tensors in zip(sites, local, strict=True):
            tensors["rows_a"].copy_(rows_a)
            tensors["rows_b"].copy_(rows_b)
            tensors["lengths"].copy_(torch.tensor([site.in_features, site.out_features]))

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for site, tensors in zip(sites, local, strict=True):
            if "A_shared" in tensors:
                bound = 1 / math.sqrt(site.in_features)
                torch.nn.init.uniform_(tensors["A_shared"], -bound, bound)
                tensors["B_shared"].zero_()
            if "A_unshared" in tensors:
                torch.nn.init.kaiming_uniform_(tensors["A_unshared"], a=math.sqrt(5))
                tensors["B_unshared"].zero_()

    def emit(self, e: Emitter) -> fx.Node:
        q, u = self.shared > 0, self.unshared > 0
        present = {"A_shared": q, "A_unshared": u, "B_shared": q, "B_unshared": u, "rows_a": q, "rows_b": q}
        tensors = [e.tensor(name) if there else None for name, there in present.items()]
        return e.add(
            e.call(prolora, e.dropped(self.dropout), *tensors, e.site.in_features, e.site.out_features, self.scale)
        )

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        A, B = [], []
        if "A_shared" in local:
            width, height = local["lengths"].tolist()
            A.append(expand(local["A_shared"], local["rows_a"], width))
            B.append(expand(local["B_shared"].t(), local["rows_b"], height).t())
        if "A_unshared" in local:
            A.append(local["A_unshared"])
            B.append(local["B_unshared"])
        return torch.cat(A), torch.cat(B, 1) * self.scale
