"""Many HydraLoRA adapters in one graph: the stacked A, routers and experts of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ....rewriter.dialect import cast, operator
from ....rewriter.emitter import Emitter
from ....rewriter.errors import AdapterError
from ....rewriter.method import BankMethod, Decl, Declaration, Method, OpenForm, Tensors
from ....rewriter.sites import Site
from ..by_sample import by_rows, chosen, no_delta, per_sample
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


@dataclass(frozen=True)
class HydraLoRABank(BankMethod, key="bank_hydralora"):
    """A stack of HydraLoRA adapters with the same number of experts.

    Args:
        slots: `K`, the base model's slot 0 included.
        rank: the largest rank a slot holds; smaller ones are padded with zeros.
        experts: `N`.

    Tensors per site, frozen: `A (K, rank, in)`, `router (K, N, in)`, `B (K, N, rank, out)`, scales folded into B.
    """

    rank: int = 4
    experts: int = 3

    def declare(self, sites: Sequence[Site]) -> Declaration:
        K, r, N = self.slots, self.rank, self.experts
        return Declaration(
            [
                {
                    "A": Decl((K, r, s.in_features), "frozen"),
                    "router": Decl((K, N, s.in_features), "frozen"),
                    "B": Decl((K, N, r, s.out_features), "frozen"),
                }
                for s in sites
            ]
        )

    def entry(
        self, method: Method, shared: Tensors, local: Tensors
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        if not isinstance(method, HydraLoRA) or method.experts != self.experts:
            raise AdapterError(f"{method} does not fit a bank of HydraLoRA adapters with {self.experts} experts")
        B = local["B"].unflatten(0, (method.experts, method.rank)) * method.scale
        return {}, {"A": local["A"], "router": local["router"], "B": B}

    def opened(self, shared: Tensors, local: Tensors) -> tuple[type[OpenForm], dict[str, Tensor]]:
        from .routed_forms import RoutedBank

        A, router = local["A"].transpose(1, 2), local["router"].transpose(1, 2)
        return RoutedBank, {"A": A, "router": router, "B": local["B"]}

    def emit(self, e: Emitter) -> fx.Node:
        tensors = [e.tensor(name) for name in ("A", "router", "B")]
        return by_rows(e, bank_hydralora, *tensors)
