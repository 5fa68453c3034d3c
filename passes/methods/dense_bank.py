"""Heads of many adapters in one graph: each sample adds the difference its adapter's trained linear makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...rewriter.dialect import cast, operator
from ...rewriter.emitter import Emitter
from ...rewriter.method import BankMethod, Decl, Declaration, Method, Tensors
from ...rewriter.sites import Site
from .by_sample import by_rows, chosen, no_delta, per_sample


@operator("bank_dense(Tensor x, Tensor? ids, Tensor weight, Tensor? bias) -> Tensor")
def bank_dense(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x_i weight[ids_i]^T + bias[ids_i]` for every sample i.

    x `(batch, ..., in)`, or `(batch * tokens, in)`; ids `(batch,)` integers below K, None for the base model; weight
    `(K, out, in)`; bias `(K, out)` or None -> the shape of x with `out` last, in x's dtype.
    """
    if ids is None:
        return no_delta(x, weight.shape[1])
    y = torch.bmm(per_sample(x, ids), cast(chosen(weight, ids), x).transpose(1, 2))
    if bias is not None:
        y = y + cast(chosen(bias, ids), x).unsqueeze(1)
    return y.reshape(*x.shape[:-1], weight.shape[1])


@dataclass(frozen=True)
class DenseBank(BankMethod, key="bank_dense"):
    """A stack of weight and bias differences to the base, for the small linears that adapters train in full.

    Args:
        slots: `K`, the base model's slot 0 included.

    Tensors per site, frozen: `weight (K, out, in)`, and `bias (K, out)` where the base has one.
    """

    def declare(self, sites: Sequence[Site]) -> Declaration:
        return Declaration(
            [
                {"weight": Decl((self.slots, s.out_features, s.in_features), "frozen")}
                | ({"bias": Decl((self.slots, s.out_features), "frozen")} if s.bias is not None else {})
                for s in sites
            ]
        )

    def entry(
        self, method: Method, shared: Tensors, local: Tensors
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return {}, local

    def emit(self, e: Emitter) -> fx.Node:
        bias = e.tensor("bias") if e.site.bias is not None else None
        return by_rows(e, bank_dense, e.tensor("weight"), bias)
