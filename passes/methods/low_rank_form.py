"""Low-rank factors of any method: many adapters in one graph, `y[i] += x[i] A[ids[i]]^T B[ids[i]]`, or its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...rewriter.dialect import Halves, cast, chain, operator, splits
from ...rewriter.forms import Axes, Form
from ...rewriter.method import Method, Tensors
from .by_sample import chosen, no_delta, per_sample


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


def _given_down(A: Tensor, B: Tensor) -> Tensor:
    return A.transpose(-1, -2)


def _given_up(z: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.matmul(z, B)


@splits(Halves(_given_down, _given_up))
@chain
def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`(x A) B`: A `(..., in, r)`, B `(..., r, out)`."""
    return torch.matmul(torch.matmul(x, A), B)


@dataclass(frozen=True)
class Factors(Form, key="bank_lora", of=Method):
    """`A (rank, in)`, `B (rank, out)`, scales folded into B."""

    axes: ClassVar[Axes] = {"A": ("rank", "in"), "B": ("rank", "out")}
    operator = bank_lora
    products = staticmethod(low_rank)

    rank: int = 8

    @classmethod
    def holds(cls, method: Method) -> bool:
        return not method.not_low_rank

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        A, B = method.factors(shared, local)
        return {"A": A, "B": B.t()}
