"""Heads of many adapters in one graph: each sample adds the difference its adapter's trained linear makes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ...rewriter.dialect import cast, operator
from ...rewriter.emitter import Emitter
from ...rewriter.forms import Axes, Form
from ...rewriter.method import Method, Tensors
from ...rewriter.sites import Site
from .by_sample import chosen, no_delta, per_sample


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
class Dense(Form, key="bank_dense"):
    """Differences of weight and bias to the base, for the small linears that adapters train in full.

    A stack only; an exported graph has it as a bank has it.
    """

    axes: ClassVar[Axes] = {"weight": ("out", "in"), "bias": ("out",)}
    operator = bank_dense

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        return dict(local)

    @classmethod
    def opened(cls, tensors: Tensors, slots: int = 0) -> tuple[Dense, dict[str, Tensor]]:
        return cls(slots=slots), dict(tensors)

    def names_at(self, site: Site) -> Collection[str]:
        return self.axes if site.bias is not None else ("weight",)

    def arguments(self, e: Emitter) -> Sequence[fx.Node | None]:
        return [e.tensor("weight"), e.tensor("bias") if e.site.bias is not None else None]
