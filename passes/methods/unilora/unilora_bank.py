"""Many Uni-LoRA adapters in one graph: one row of a `(K, d)` matrix each, and the projection once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, fx

from ....rewriter.dialect import cast, operator
from ....rewriter.emitter import Emitter
from ....rewriter.errors import AdapterError
from ....rewriter.method import BankMethod, Decl, Declaration, InitContext, Method, OpenForm, Tensors
from ....rewriter.sites import Site
from ..by_sample import by_rows, no_delta, per_sample
from .unilora import UniLoRA


@operator("bank_unilora(Tensor x, Tensor? ids, Tensor theta, Tensor counts, Tensor index_a, Tensor index_b) -> Tensor")
def bank_unilora(
    x: Tensor, ids: Tensor | None, theta: Tensor, counts: Tensor, index_a: Tensor, index_b: Tensor
) -> Tensor:
    """`unilora` for every sample with the vector of its adapter.

    x `(batch, ..., in)`, or `(batch * tokens, in)`; ids `(batch,)` integers below K, None for the base model; theta
    `(K, d)`; counts `(d,)`; index_a `(r, in)` and index_b `(r, out)` int32 -> the shape of x with `out` last, in x's
    dtype. A call gathers `batch * r * (in + out)` entries.
    """
    if ids is None:
        return no_delta(x, index_b.shape[-1])
    if theta.device != x.device:  # a model spread over devices: the vectors live on the first
        theta, counts = theta.to(x.device), counts.to(x.device)
    ids = ids if ids.device == x.device else ids.to(x.device)
    scaled = theta.index_select(0, ids) * counts.to(theta.dtype).rsqrt()  # (batch, d)
    A = scaled.index_select(1, index_a.flatten()).view(-1, *index_a.shape)
    B = scaled.index_select(1, index_b.flatten()).view(-1, *index_b.shape)
    z = torch.bmm(per_sample(x, ids), cast(A, x).transpose(1, 2))
    return torch.bmm(z, cast(B, x)).reshape(*x.shape[:-1], index_b.shape[-1])


@dataclass(frozen=True)
class UniLoRABank(BankMethod, UniLoRA, key="bank_unilora"):
    """A stack of Uni-LoRA vectors over one projection.

    Args:
        slots: `K`, the base model's slot 0 included; the others are the adapters' own (`UniLoRA`).

    Shared: `theta (K, d)`, frozen; derived tensors as `UniLoRA` has them.
    """

    def declare(self, sites: Sequence[Site]) -> Declaration:
        one = UniLoRA.declare(self, sites)
        return Declaration(one.local, {**one.shared, "theta": Decl((self.slots, self.vector_length), "frozen")})

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        shared["theta"].zero_()

    def entry(
        self, method: Method, shared: Tensors, local: Tensors
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        if any(getattr(method, f.name, None) != getattr(self, f.name) for f in fields(UniLoRA)):
            raise AdapterError(
                f"{method} has another projection than the bank's {self}; make the bank with expand=True"
            )
        return {"theta": shared["theta"]}, {}

    def opened(self, shared: Tensors, local: Tensors) -> tuple[type[OpenForm], dict[str, Tensor]]:
        from ..factor_forms import FactorsBank

        pairs = [self.factors({**shared, "theta": theta}, local) for theta in shared["theta"]]
        return FactorsBank, {"A": torch.stack([A.t() for A, _ in pairs]), "B": torch.stack([B.t() for _, B in pairs])}

    def emit(self, e: Emitter) -> fx.Node:
        tensors = e.shared("theta"), e.shared("counts"), e.tensor("index_a"), e.tensor("index_b")
        return by_rows(e, bank_unilora, *tensors)
