"""What the operators of banks have in common: every sample with tensors of its own."""

from __future__ import annotations

from torch import Tensor

from ...rewriter.calls.sample_rows import check_first


def per_sample(x: Tensor, ids: Tensor) -> Tensor:
    """`(batch, tokens, in)` of x `(batch, ..., in)` or `(batch * tokens, in)`, samples one after the other."""
    check_first(x, ids.shape[0])
    return x.reshape(ids.shape[0], -1, x.shape[-1])


def chosen(stack: Tensor, ids: Tensor) -> Tensor:
    """A stack's entry for every sample; the ids come from the device of the model's inputs."""
    return stack.index_select(0, ids if ids.device == stack.device else ids.to(stack.device))


def no_delta(x: Tensor, out_features: int) -> Tensor:
    """The delta of a call without ids: the base model."""
    return x.new_zeros(1).expand(*x.shape[:-1], out_features)
