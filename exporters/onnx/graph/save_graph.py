"""Writing a graph: weights inside it, or in files of their own beside it, see `weight_files`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....rewriter.errors import ExportError
from .weight_files import lay_out, link

# protobuf ends at 2 GiB; beyond this the weights go to a file of their own.
INLINE_BYTES = 1_500_000_000


def save(
    model: Any, file: Path, external_data: bool | None, folder: Path, forms: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write an onnx_ir model, and hold it against `onnx.checker`.

    `external_data` puts weights in files called after their content; None does so where protobuf cannot hold them.
    `folder` is where the graph goes in the end, `forms` are the base model's tensors. Raises `ExportError`.
    """
    import onnx
    import onnx_ir as ir

    values = (value.const_value for value in model.graph.initializers.values())
    size = sum(value.nbytes for value in values if value is not None)
    outside = size > INLINE_BYTES if external_data is None else external_data
    try:
        links = lay_out(model, file.parent, folder, forms or {}) if outside else {}
        ir.save(model, file)
        onnx.checker.check_model(str(file))
        link(links)
    except OSError as error:
        raise ExportError(f"cannot write {file.name!r}: {error.strerror or error}") from error
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error
