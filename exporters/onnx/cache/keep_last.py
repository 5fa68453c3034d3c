"""The end of a dimension, of whatever length it is: what a window keeps of its past."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fxgraft::keep_last", mutates_args=())
def keep_last(x: Tensor, count: int) -> Tensor:
    """The last `count` entries of dimension 2, or all where there are fewer. For graphs that are exported: a slice of
    Python asks which of the two it is, and a graph would hold the answer of its example."""
    return x[:, :, max(0, x.shape[2] - count) :].clone()


@keep_last.register_fake
def _(x: Tensor, count: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], torch.library.get_ctx().new_dynamic_size(), *x.shape[3:]))


def in_onnx(x: Any, count: int) -> Any:
    """The operator for `torch.onnx.export(custom_translation_table=)`. ONNX stops a slice at the ends of the axis."""
    from onnxscript import opset18

    op: Any = opset18
    starts, ends, axes = (op.Constant(value_ints=[value]) for value in (-count, 2**62, 2))
    return op.Slice(x, starts, ends, axes)
