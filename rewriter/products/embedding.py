"""Lookups: `y = W[ids]`, which is the product of `W^T` with one-hot rows that are never made.

    F.embedding(ids, W)  ->  F.embedding(ids, W) + F.embedding(ids, down^T) across^T

The matrix of a lookup is `W^T (dim, entries)`: PEFT's `lora_embedding_B (dim, r)` with `lora_embedding_A (r, entries)`.
The padding entry is no part of it: `padding_idx` promises that training leaves its row as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .product import Call, NoMatch, Product, ProductNode, Use, bind

aten = torch.ops.aten

_FUNCTIONS = {F.embedding, torch.embedding}
_OPERATORS = {aten.embedding.default}


@dataclass(frozen=True)
class Embedding(Product):
    """`y = W[ids]`, with the weight `(entries, dim)`.

    Adapters have no dropout there: a lookup has no values that could be dropped (PEFT's has none either).

    Args:
        padding_idx: the entry that is not trained, counted from 0; None for none.
        by_frequency: gradients are divided by how often an entry was looked up.
    """

    one_hot: ClassVar[bool] = True
    several: ClassVar[str] = "is looked up in ways that differ (padding_idx, scale_grad_by_freq)"

    padding_idx: int | None = None
    by_frequency: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def matrix_node(self, call: Call, weight: fx.Node) -> fx.Node:
        return call(torch.t, weight)

    def put(self, weight: Tensor, offset: int, rows: Tensor) -> None:
        place = self.matrix(weight).narrow(0, offset, rows.shape[0])
        kept = None if self.padding_idx is None else place[:, self.padding_idx].clone()
        place.copy_(rows)
        if kept is not None:
            place[:, self.padding_idx] = kept

    def refusal(self, operator: str) -> str:
        if operator.startswith("bank"):
            return (
                "an embedding is looked up and multiplies no rows that a bank could hand to each sample's adapter: "
                "make the bank of adapters without this site, or serve one adapter at a time"
            )
        return (
            f"an embedding is looked up and multiplies no rows, which {operator} needs: methods that are a product of "
            "two factors can be there (LoRA and its kin), others not. Exclude it, or give it another method with "
            "overrides="
        )

    def down(self, call: Call, x: fx.Node, factor: fx.Node) -> fx.Node:
        return call(looked_up, x, factor, self.padding_idx, self.by_frequency)


def looked_up(ids: Tensor, factor: Tensor, padding_idx: int | None, by_frequency: bool) -> Tensor:
    """The columns of a factor `(q, entries)` at ids `(...)`: `(..., q)`, zero at the padding entry."""
    z = F.embedding(ids, factor.t(), padding_idx, scale_grad_by_freq=by_frequency)
    return z if padding_idx is None else z * (ids != padding_idx).unsqueeze(-1)


def match_embedding(use: Use) -> ProductNode | NoMatch | None:
    """The lookup that a node makes in a weight."""
    node = use.node
    if node.op != "call_function" or node.target not in _FUNCTIONS | _OPERATORS:
        return None
    found = _arguments(node)
    if found is None:
        return NoMatch(f"{node.target} is called with arguments that are not understood", node.name)
    ids, weight, padding, max_norm, by_frequency = found
    if weight not in use.views or use.views[weight] or use.tensors[use.name].dim() != 2:
        return NoMatch(f"{use.name!r} is looked up transposed, or is what is looked up in it", node.name)
    if max_norm is not None:
        return NoMatch(
            f"max_norm={max_norm} rescales the rows that are looked up, in place, by their own length: the sum with an "
            "adapter would be another one. Set max_norm=None",
            node.name,
        )
    if not isinstance(ids, fx.Node) or ids in use.views:
        return NoMatch("what is looked up is a constant", node.name)
    entries = use.tensors[use.name].shape[0]
    if padding is not None:
        padding = padding + entries if padding < 0 else padding
    kind = Embedding(padding_idx=padding, by_frequency=bool(by_frequency))
    return ProductNode(node, ids, use.read, use.name, kind, None, "embedding")


def _arguments(node: fx.Node) -> Sequence[Any] | None:
    """The ids, the weight, padding_idx (None for none), max_norm and scale_grad_by_freq of a lookup."""
    if node.target is F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        bound = bind(node, *((name,) for name in names))
        if bound is None:
            return None
        ids, weight, padding, max_norm, _, by_frequency, _ = bound
    else:
        bound = bind(node, ("weight",), ("indices",), ("padding_idx",), ("scale_grad_by_freq",), ("sparse",))
        if bound is None:
            return None
        weight, ids, padding, by_frequency, _ = bound
        max_norm, padding = None, None if padding == -1 else padding
    plain = (padding is None or type(padding) is int) and (by_frequency is None or isinstance(by_frequency, bool))
    return (ids, weight, padding, max_norm, by_frequency) if plain else None
