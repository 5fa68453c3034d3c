"""The samples of an estimate: batches up to a number of examples, and the backward pass of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ....rewriter.errors import SpecError

Loss = Callable[[Any, Any], Tensor]
Forward = Callable[[Any, Any], Any]


def limited(batches: Iterable[Any], samples: int) -> Iterator[tuple[Any, int]]:
    """`(batch, its number of examples)` up to so many examples, the last batch cut where it can be."""
    left = samples
    for batch in batches if left else ():
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        leaves = pytree.tree_leaves(batch)
        size = next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), 0)
        if size == 0:
            raise SpecError(
                f"estimate_update: a batch is a {type(batch).__name__} without a tensor of examples; give dicts, "
                "tuples, lists or tensors"
            )
        if size > left and all(isinstance(leaf, (Tensor, int, float, bool, type(None))) for leaf in leaves):
            batch = _cut(batch, size, left)
            size = left
        yield batch, size
        left -= size
        if left <= 0:
            return


def _cut(batch: Any, size: int, keep: int) -> Any:
    """The first `keep` examples of a batch of `size`; tensors of another length do not count examples."""

    def cut(leaf: Any) -> Any:
        return leaf[:keep] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else leaf

    return pytree.tree_map(cut, batch)


def backward(
    twin: nn.Module, batch: Any, examples: int, device: torch.device, loss: Loss | None, forward: Forward | None
) -> None:
    """Add one batch's gradients to the sums: backward runs their hooks."""
    batch = pytree.tree_map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, batch)
    with torch.enable_grad():
        if forward is not None:
            output = forward(twin, batch)
        elif isinstance(batch, dict):
            output = twin(**batch)
        else:
            output = twin(*batch) if isinstance(batch, (tuple, list)) else twin(batch)
        value: Any = getattr(output, "loss", None) if loss is None else loss(output, batch)
        if loss is None and value is None:
            raise SpecError(
                f"estimate_update: the model's output ({type(output).__name__}) has no loss; put labels into the "
                "batches, or give loss=lambda output, batch: ..."
            )
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise SpecError(f"estimate_update: the loss is {shape}, not one number")
        if not torch.isfinite(value):
            raise SpecError(f"estimate_update: the loss is {value.item()}; no gradient can be taken from it")
        if value.requires_grad:  # otherwise no target took part, which the caller reports by name
            (value.reshape(()) * examples).backward()
