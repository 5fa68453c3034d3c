"""HydraLoRA as inputs of a graph: any rank and any number of experts, for one adapter or a stack of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....rewriter.emitter import Emitter
from ....rewriter.errors import AdapterError
from ....rewriter.method import ADAPTER_IDS, Method, OpenForm, Tensors
from ..by_sample import by_rows
from ..factor_forms import by_sample
from .hydralora import HydraLoRA


def routed(x: Tensor, A: Tensor, router: Tensor, B: Tensor) -> Tensor:
    """`sum_i softmax(x router)_i * (x A) B_i`: A `(..., in, r)`, router `(..., in, N)`, B `(..., N, r, out)`.

    The softmax is float32 (float64 for float64 inputs). Leading dimensions are those of the samples.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = torch.matmul(x, router).softmax(-1, dtype=wide).to(x.dtype)
    mixed = (w.unsqueeze(-1) * torch.matmul(x, A).unsqueeze(-2)).flatten(-2)
    return torch.matmul(mixed, B.flatten(-3, -2))


@dataclass(frozen=True)
class Routed(OpenForm, key="routed"):
    """`A (in, r)`, `router (in, N)`, `B (N, r, out)`, scales folded into B."""

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "A": ("in", "rank"),
        "router": ("in", "experts"),
        "B": ("experts", "rank", "out"),
    }
    not_low_rank: ClassVar[str | None] = HydraLoRA.not_low_rank

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        if not isinstance(method, HydraLoRA):
            raise AdapterError(f"{method} has no router: it does not fit a graph of HydraLoRA adapters")
        B = local["B"].unflatten(0, (method.experts, method.rank)) * method.scale
        return {"A": local["A"].t(), "router": local["router"].t(), "B": B}

    @classmethod
    def grown(cls, tensors: Tensors, step: int) -> dict[str, Tensor]:
        # Zero columns change nothing but the rank. Where every expert is there 1 + step times, each of its twins has
        # its share of the expert's weight.
        return {
            "A": F.pad(tensors["A"], (0, step)),
            "router": tensors["router"].repeat(1, 1 + step),
            "B": F.pad(tensors["B"], (0, 0, 0, step)).repeat(1 + step, 1, 1),
        }

    def emit(self, e: Emitter) -> fx.Node:
        return e.add(e.call(routed, e.x, *(e.tensor(name) for name in self.axes)))


def stacked_routed(x: Tensor, ids: Tensor, A: Tensor, router: Tensor, B: Tensor) -> Tensor:
    """`routed` with the tensors of each sample's slot: A `(K, in, r)`, router `(K, in, N)`, B `(K, N, r, out)`."""
    chosen = [tensor.index_select(0, ids) for tensor in (A, router, B)]
    return by_sample(x, ids, lambda rows: routed(rows, *chosen))


@dataclass(frozen=True)
class RoutedBank(OpenForm, key="routed_bank"):
    """A stack of `Routed`: `A (K, in, r)`, `router (K, in, N)`, `B (K, N, r, out)`, and the slot of every sample."""

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {name: ("slots", *axes) for name, axes in Routed.axes.items()}
    inputs: ClassVar[tuple[str, ...]] = (ADAPTER_IDS,)
    not_low_rank: ClassVar[str | None] = HydraLoRA.not_low_rank

    @classmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        return dict(local)

    @classmethod
    def grown(cls, tensors: Tensors, step: int) -> dict[str, Tensor]:
        # A bank has one number of experts: a slot with fewer would give its weights to experts that are not there.
        return {
            "A": F.pad(tensors["A"], (0, step, 0, 0, 0, step)),
            "router": F.pad(tensors["router"], (0, 0, 0, 0, 0, step)),
            "B": F.pad(tensors["B"], (0, 0, 0, step, 0, 0, 0, step)),
        }

    def emit(self, e: Emitter) -> fx.Node:
        return by_rows(e, stacked_routed, *(e.tensor(name) for name in self.axes))
