"""Many low-rank adapters in one graph, of any method that has factors: `y[i] += x[i] A[ids[i]]^T B[ids[i]]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...rewriter.dialect import cast, operator
from ...rewriter.emitter import Emitter
from ...rewriter.method import BankMethod, Decl, Declaration, Method, OpenForm, Tensors
from ...rewriter.sites import Site
from .by_sample import by_rows, chosen, no_delta, per_sample


@operator("bank_lora(Tensor x, Tensor? ids, Tensor A, Tensor B) -> Tensor")
def bank_lora(x: Tensor, ids: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """`x_i A[ids_i]^T B[ids_i]` for every sample i.

    x `(batch, ..., in)`, or `(batch * tokens, in)` with the samples one after the other; ids `(batch,)` integers below
    K, None for the base model; A `(K, r, in)`; B `(K, r, out)` -> the shape of x with `out` last, in x's dtype. Both
    factors lie along their long side: for one token the products read them once, in order.
    """
    if ids is None:
        return no_delta(x, B.shape[-1])
    z = torch.bmm(per_sample(x, ids), cast(chosen(A, ids), x).transpose(1, 2))
    return torch.bmm(z, cast(chosen(B, ids), x)).reshape(*x.shape[:-1], B.shape[-1])


@dataclass(frozen=True)
class LoRABank(BankMethod, key="bank_lora"):
    """A stack of low-rank factors.

    Args:
        slots: `K`, the base model's slot 0 included.
        rank: the largest rank a slot holds; smaller ones are padded with zeros.

    Tensors per site, frozen: `A (K, rank, in)`, `B (K, rank, out)`, scales folded into B.
    """

    rank: int = 8

    def declare(self, sites: Sequence[Site]) -> Declaration:
        K, r = self.slots, self.rank
        return Declaration(
            [{"A": Decl((K, r, s.in_features), "frozen"), "B": Decl((K, r, s.out_features), "frozen")} for s in sites]
        )

    def entry(
        self, method: Method, shared: Tensors, local: Tensors
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        A, B = method.factors(shared, local)
        return {}, {"A": A, "B": B.t()}

    def opened(self, shared: Tensors, local: Tensors) -> tuple[type[OpenForm], dict[str, Tensor]]:
        from .factor_forms import FactorsBank

        return FactorsBank, {"A": local["A"].transpose(1, 2), "B": local["B"]}

    def emit(self, e: Emitter) -> fx.Node:
        return by_rows(e, bank_lora, e.tensor("A"), e.tensor("B"))
