"""Many Uni-LoRA adapters in one graph: one row of a `(K, d)` matrix each, and the projection once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ....rewriter.dialect import cast, operator
from ....rewriter.emitter import Emitter
from ....rewriter.forms import Axes, Form
from ....rewriter.method import Decl, Declaration, Method, Tensors
from ....rewriter.sites import Site
from ..by_sample import chosen, no_delta, per_sample
from .gather import gather, scale_vector
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
    A, B = gather(scale_vector(chosen(theta, ids), counts), (index_a, index_b))  # (batch, r, in), (batch, r, out)
    z = torch.bmm(per_sample(x, ids), cast(A, x).transpose(1, 2))
    return torch.bmm(z, cast(B, x)).reshape(*x.shape[:-1], index_b.shape[-1])


@dataclass(frozen=True)
class Vector(Form, UniLoRA, key="bank_unilora", of=UniLoRA):
    """A stack of Uni-LoRA vectors over one projection, of the config that they have in common."""

    shared_axes: ClassVar[Axes] = {"theta": ("vector_length",)}
    derives: ClassVar[bool] = True
    operator = bank_unilora

    @classmethod
    def holds(cls, method: Method) -> bool:
        return isinstance(method, UniLoRA) and method.sampler != "stored"

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        return {"theta": shared["theta"]}

    def declare(self, sites: Sequence[Site]) -> Declaration:
        one = UniLoRA.declare(self, sites)
        return Declaration(one.local, {**one.shared, "theta": Decl((self.slots, self.vector_length), "frozen")})

    def arguments(self, e: Emitter) -> Sequence[fx.Node]:
        return [e.shared("theta"), e.shared("counts"), e.tensor("index_a"), e.tensor("index_b")]
