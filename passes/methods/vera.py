"""VeRA: `y += diag(b) B diag(d) A dropout(x)` with only the vectors d and b trained (arXiv 2310.11454, section 3).

`A` and `B` are random, frozen, and one pair for the whole model. Where layers differ in size, each reads the first `in`
columns of A and the first `out` rows of B, as HF PEFT does. Nothing of the size of a layer is stored per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...rewriter.config_checks import check_dropout, check_positive, check_positive_int
from ...rewriter.dialect import Halves, Traits, cast, operator
from ...rewriter.emitter import Emitter
from ...rewriter.errors import SpecError
from ...rewriter.forms import Axes, Form
from ...rewriter.method import Decl, Declaration, InitContext, Method, Role, Tensors
from ...rewriter.sites import Site
from .by_sample import chosen, no_delta, per_sample

PROJECTIONS = ("drawn", "stored")


def vera_down(A: Tensor, B: Tensor, d: Tensor, b: Tensor, columns: int) -> Tensor:
    """`A (r, in)`, a view."""
    return near(A, d)[:, :columns]


def vera_across(A: Tensor, B: Tensor, d: Tensor, b: Tensor, columns: int) -> Tensor:
    """`diag(b) B diag(d) (out, r)`."""
    return b[:, None] * near(B, d)[: b.shape[0]] * d


def vera_up(z: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, columns: int) -> Tensor:
    """`b * (B (d * z))`: no product of the size of B."""
    return F.linear(z * cast(d, z), cast(near(B, d)[: b.shape[0]], z)) * cast(b, z)


def near(shared: Tensor, own: Tensor) -> Tensor:
    """A or B where a layer's own tensors are: of a model spread over devices it lives on the first."""
    return shared if shared.device == own.device else shared.to(own.device)


@operator(
    "vera(Tensor x, Tensor A, Tensor B, Tensor d, Tensor b, int columns) -> Tensor",
    Traits(Halves(vera_down, vera_up, vera_across, reads=(0, 4))),
)
def vera(x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, columns: int) -> Tensor:
    """`b * (B (d * (A x)))` with A and B cut to the layer.

    x `(..., in)`; A `(r, at least in)`; B `(at least out, r)`; d `(r,)`; b `(out,)`; columns: in -> `(..., out)` in x's
    dtype.
    """
    return vera_up(F.linear(x, cast(vera_down(A, B, d, b, columns), x)), A, B, d, b, columns)


def draw(rank: int, columns: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A `(rank, columns)` and B `(rows, rank)`, Kaiming-uniform, float32 on the CPU.

    Number for number what HF PEFT 0.21 draws from `projection_prng_key`: both from one generator, A first, the bound
    `sqrt(6 / fan_in)` computed as `torch.nn.init` does.
    """
    generator = torch.Generator().manual_seed(seed)
    pair = torch.empty(rank, columns, dtype=torch.float32), torch.empty(rows, rank, dtype=torch.float32)
    for matrix in pair:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return pair


@dataclass(frozen=True)
class VeRA(Method, key="vera"):
    """VeRA (arXiv 2310.11454).

    Args:
        rank: `r`. It may exceed `in` and `out` of a site: every entry of d is a number to train.
        seed: of A and B. They are drawn from it, and never saved.
        d_initial: what the entries of d start from.
        dropout: probability, on the adapter's input, in training only.
        projection: `drawn`, or `stored`: A and B, though drawn from the seed too, are saved with the adapter, for
            whom torch's generator on another machine is no promise. It is also what `load_adapter` gives an adapter
            that came with a projection which is not its seed's; the seed then means nothing.

    Shared tensors: `A (rank, largest in)` and `B (largest out, rank)`, float, derived. Per site `d (rank,)`, constant,
    and `b (out,)`, zero; both train. There is no alpha. Starts as a no-op.

    Raises:
        SpecError: a value outside its range.
    """

    free: ClassVar[tuple[str, ...]] = ("dropout", "d_initial")
    by_size: ClassVar[bool] = True
    vectors: ClassVar[tuple[str, ...]] = ("d", "b")  # the paper trains them at rates well above those of LoRA

    rank: int = 256
    seed: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0
    projection: Literal["drawn", "stored"] = "drawn"

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise SpecError(f"VeRA(seed={self.seed!r}): allowed are whole numbers from 0 up to below 2**64")
        check_positive(self, d_initial=self.d_initial)
        check_dropout(self, self.dropout)
        if self.projection not in PROJECTIONS:
            raise SpecError(f"VeRA(projection={self.projection!r}): allowed are {PROJECTIONS}")

    def meaning(self) -> dict[str, Any]:
        return super().meaning() | ({"seed": None} if self.projection == "stored" else {})

    def declare(self, sites: Sequence[Site]) -> Declaration:
        role: Role = "frozen" if self.projection == "stored" else "derived"
        columns, rows = max(s.in_features for s in sites), max(s.out_features for s in sites)
        return Declaration(
            [{"d": Decl((self.rank,)), "b": Decl((s.out_features,))} for s in sites],
            {"A": Decl((self.rank, columns), role), "B": Decl((rows, self.rank), role)},
        )

    def derive(self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
        if self.projection == "drawn":
            self._draw(shared)

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        if self.projection == "stored":
            self._draw(shared)
        for tensors in local:
            tensors["d"].fill_(self.d_initial)
            tensors["b"].zero_()

    def _draw(self, shared: Tensors) -> None:
        A, B = draw(self.rank, shared["A"].shape[1], shared["B"].shape[0], self.seed)
        shared["A"].copy_(A)
        shared["B"].copy_(B)

    def seen_by(self, site: Site, shared: Tensors) -> Tensors:
        return {"A": shared["A"][:, : site.in_features], "B": shared["B"][: site.out_features]}

    def emit(self, e: Emitter) -> fx.Node:
        vectors = e.tensor("d"), e.tensor("b")
        return e.add(
            e.call(vera, e.dropped(self.dropout), e.shared("A"), e.shared("B"), *vectors, e.site.in_features)
        )  # fmt: skip

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        A, B, d, b = shared["A"], shared["B"], local["d"], local["b"]
        return vera_down(A, B, d, b, A.shape[1]), vera_across(A, B, d, b, A.shape[1])


# -- many adapters in one graph: a row of d and a row of b each, and the projection once -------------------------------
@operator("bank_vera(Tensor x, Tensor? ids, Tensor A, Tensor B, Tensor d, Tensor b) -> Tensor")
def bank_vera(x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """`vera` for every sample with the vectors of its adapter; the two products are one for all samples.

    x `(batch, ..., in)`, or `(batch * tokens, in)`; ids `(batch,)` integers below K, None for the base model; A and B
    as in `vera`; d `(K, r)`; b `(K, out)` -> the shape of x with `out` last, in x's dtype.
    """
    if ids is None:
        return no_delta(x, b.shape[1])
    z = F.linear(per_sample(x, ids), cast(near(A, d)[:, : x.shape[-1]], x)) * cast(chosen(d, ids), x).unsqueeze(1)
    y = F.linear(z, cast(near(B, d)[: b.shape[1]], x)) * cast(chosen(b, ids), x).unsqueeze(1)
    return y.reshape(*x.shape[:-1], b.shape[1])


@dataclass(frozen=True)
class Vectors(Form, VeRA, key="bank_vera", of=VeRA):
    """A stack of VeRA vectors over one projection, of the config that the adapters have in common."""

    axes: ClassVar[Axes] = {"d": ("rank",), "b": ("out",)}
    derives: ClassVar[bool] = True
    operator = bank_vera

    @classmethod
    def holds(cls, method: Method) -> bool:
        return isinstance(method, VeRA) and method.projection != "stored"

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        return dict(local)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        return Declaration(Form.declare(self, sites).local, VeRA.declare(self, sites).shared)

    def arguments(self, e: Emitter) -> Sequence[fx.Node]:
        return [e.shared("A"), e.shared("B"), e.tensor("d"), e.tensor("b")]
