"""Does the exported graph compute what torch computes? Measured on the written file, before it reaches its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.artifact.parity import Parity, Truth, hold, sizes_of
from ...rewriter.errors import ExportError, ParityError
from ..adapterfiles import graph_manifest as manifest
from ..adapterfiles.ort_values import to_array, to_ort
from .widen import widened


def quiet_session(path: Path) -> Any:
    """A CPU session without onnxruntime's remark on every overridable initializer.

    A bfloat16 graph, which the CPU has no kernels for, computes in float32 with its bfloat16 weights.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Where a graph that is given as bytes has its external weights.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    # Packed weights are a second copy of them, for a handful of runs.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(widened(path) or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        raise ExportError(f"onnxruntime does not load the exported graph: {error}") from error


def compare(
    session: Any,
    case: str,
    inputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, np.ndarray],
    tolerance: float,
    feeds: Mapping[str, torch.Tensor] | None = None,
    truth: Truth | None = None,
    otherwise: float = 0.0,
) -> Parity:
    """Run `session` on `inputs` (and adapter tensors) and hold every output against `expected`.

    Raises `ParityError` where onnxruntime fails or differs, see `hold`, also for `truth` and `otherwise`.
    """
    sizes = sizes_of(inputs)
    try:
        got = run(session, {**inputs, **(feeds or {})}, list(expected))
    except Exception as error:  # as above
        raise ParityError(f"onnxruntime fails on the exported graph ({case}; {sizes}): {error}") from error
    return hold(got, expected, "onnxruntime", case, sizes, tolerance, truth, otherwise)


def run(session: Any, values: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, np.ndarray]:
    """One run of a session of onnxruntime, by the model's names; raises what that raises. A widened graph takes its
    inputs widened."""
    renamed = manifest.renamed(session)
    values = {renamed.inputs.get(name, name): tensor for name, tensor in values.items()}
    ends = [*session.get_inputs(), *session.get_overridable_initializers()]
    wide = {value.name for value in ends if value.type == "tensor(float)"}
    fed = {name: tensor.float() if name in wide else tensor for name, tensor in values.items()}
    wanted = [renamed.outputs.get(name, name) for name in names]
    results = session.run_with_ort_values(wanted, {name: to_ort(tensor) for name, tensor in fed.items()})
    return {name: to_array(value) for name, value in zip(names, results, strict=True)}
