"""Operators that the exporter of torch has no ONNX for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cache.keep_last import in_onnx


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=)`.

    `_is_all_true` and `_is_any_true` are what `torch._check` leaves of a condition over a tensor (the image tokens of
    LLaVA).
    """
    from onnx_ir import DataType
    from onnxscript import opset18

    op: Any = opset18  # its types know no value whose type is not known yet

    def all_true(mask: Any) -> Any:
        return op.Cast(op.ReduceMin(op.Cast(mask, to=int(DataType.INT64)), keepdims=0), to=int(DataType.BOOL))

    def any_true(mask: Any) -> Any:
        return op.Cast(op.ReduceMax(op.Cast(mask, to=int(DataType.INT64)), keepdims=0), to=int(DataType.BOOL))

    return {
        torch.ops.aten._is_all_true.default: all_true,
        torch.ops.aten._is_any_true.default: any_true,
        torch.ops.fxgraft.keep_last.default: in_onnx,
    }
