"""HydraLoRA adapters of any rank: many in one graph, or as a graph's inputs, with any number of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....rewriter.dialect import cast, operator
from ....rewriter.errors import AdapterError, SpecError
from ....rewriter.forms import Axes, Form
from ....rewriter.method import Method, Tensors
from ..by_sample import chosen, no_delta, per_sample
from .hydralora import HydraLoRA


@operator("bank_hydralora(Tensor x, Tensor? ids, Tensor A, Tensor router, Tensor B) -> Tensor")
def bank_hydralora(x: Tensor, ids: Tensor | None, A: Tensor, router: Tensor, B: Tensor) -> Tensor:
    """`hydralora` for every sample with the tensors of its adapter.

    x `(batch, ..., in)`, or `(batch * tokens, in)`; ids `(batch,)` integers below K, None for the base model; A
    `(K, r, in)`; router `(K, N, in)`; B `(K, N, r, out)`, scaled -> the shape of x with `out` last, in x's dtype. The
    softmax is float32 (float64 for float64 inputs).
    """
    out_features, rank, experts = B.shape[-1], A.shape[1], router.shape[1]
    if ids is None:
        return no_delta(x, out_features)
    both = torch.cat([chosen(A, ids), chosen(router, ids)], 1)
    z, logits = torch.bmm(per_sample(x, ids), cast(both, x).transpose(1, 2)).split([rank, experts], -1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = logits.softmax(-1, dtype=wide).to(x.dtype)
    mixed = (w.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
    return torch.bmm(mixed, cast(chosen(B, ids), x).flatten(1, 2)).reshape(*x.shape[:-1], out_features)


def routed(x: Tensor, A: Tensor, router: Tensor, B: Tensor) -> Tensor:
    """`sum_i softmax(x router)_i * (x A) B_i`: A `(..., in, r)`, router `(..., in, N)`, B `(..., N, r, out)`.

    The softmax is float32 (float64 for float64 inputs). Leading dimensions are those of the samples.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = torch.matmul(x, router).softmax(-1, dtype=wide).to(x.dtype)
    mixed = (w.unsqueeze(-1) * torch.matmul(x, A).unsqueeze(-2)).flatten(-2)
    return torch.matmul(mixed, B.flatten(-3, -2))


@dataclass(frozen=True)
class Routed(Form, key="bank_hydralora", of=HydraLoRA):
    """`A (rank, in)`, `router (experts, in)`, `B (experts, rank, out)`, scales folded into B.

    A stack has one number of experts: a slot with fewer would give its weights to experts that are not there.
    """

    axes: ClassVar[Axes] = {"A": ("rank", "in"), "router": ("experts", "in"), "B": ("experts", "rank", "out")}
    whole: ClassVar[tuple[str, ...]] = ("experts",)
    no_sum: ClassVar[str | None] = "choose among experts by the input"
    operator = bank_hydralora
    products = staticmethod(routed)

    rank: int = 4
    experts: int = 3

    @classmethod
    def stack_of(cls, methods: Sequence[Method], slots: int) -> Form | None:
        hydra = [method for method in methods if isinstance(method, HydraLoRA)]
        experts = sorted({method.experts for method in hydra})
        if len(experts) != 1:
            raise SpecError(
                f"a bank of HydraLoRA adapters has one number of experts, as the router's softmax runs over them; "
                f"given were {experts}: make a bank for each"
            )
        return cls(slots=slots, rank=max(method.rank for method in hydra), experts=experts[0])

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        assert isinstance(method, HydraLoRA)
        B = local["B"].unflatten(0, (method.experts, method.rank)) * method.scale
        return {"A": local["A"], "router": local["router"], "B": B}

    def entry(self, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        if not isinstance(method, HydraLoRA) or method.experts != self.experts:
            raise AdapterError(f"{method} does not fit a bank of HydraLoRA adapters with {self.experts} experts")
        return self.read(method, shared, local)

    def grown(self, tensors: Tensors, step: int) -> dict[str, Tensor]:
        larger = super().grown(tensors, step)
        if self.slots:
            return larger
        # Where every expert is there 1 + step times, each of its twins has its share of the expert's weight.
        times = {name: [1 + step if axis == "experts" else 1 for axis in self.layout(name)] for name in larger}
        return {name: tensor.repeat(times[name]) for name, tensor in larger.items()}
