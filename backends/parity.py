"""Does what was written compute what torch computes? The rule, for whichever runtime runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..rewriter.errors import ExportError, ParityError
from ..rewriter.signature import named_tensors

# Largest difference over the largest magnitude of an output. float32 leaves room for some thirty layers whose sums
# another runtime orders differently; one layer differs by 1e-7.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Parity:
    """One comparison of a runtime with torch: what was run, and the largest difference over all outputs.

    `absolute` is max |runtime - torch|; `relative` is that over the largest |torch| of the same output.
    """

    case: str
    sizes: str
    absolute: float
    relative: float


def tolerance_of(model: torch.nn.Module) -> float:
    """The tolerance for the least precise floating dtype among the model's parameters (float32 without any)."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & set(TOLERANCES)
    return max((TOLERANCES[dtype] for dtype in dtypes), default=TOLERANCES[torch.float32])


def sizes_of(inputs: Mapping[str, Any]) -> str:
    """`input_ids 3x8, scale scalar`: the shapes of arrays or tensors, for a text."""
    return ", ".join(f"{name} {'x'.join(map(str, value.shape)) or 'scalar'}" for name, value in inputs.items())


def reference(model: torch.nn.Module, inputs: Mapping[str, Any], case: str) -> dict[str, np.ndarray]:
    """The model's named outputs for keyword `inputs`, as arrays on the CPU. Raises `ExportError` if it does not run."""
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:  # whatever the model raises on unfit inputs is the caller's to read
        raise ExportError(
            f"the model runs on the example but not on other sizes ({case}): {type(error).__name__}: {error}. "
            "Fix the axes it cannot change with dynamic_shapes (dynamic_shapes={} fixes every axis)"
        ) from error
    return {name: array(tensor) for name, tensor in named_tensors(output).items()}


def array(tensor: torch.Tensor) -> np.ndarray:
    """A numpy copy on the CPU; bfloat16, which numpy lacks, as float32 of the same values."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def hold(
    results: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    runtime: str,
    case: str,
    sizes: str,
    tolerance: float,
) -> Parity:
    """Hold every output of a runtime against torch's.

    Raises `ParityError` naming the output, the sizes and the figure where shapes differ, integers are not equal, a
    number is NaN, or the difference exceeds `tolerance` times the largest magnitude of the output.
    """
    absolute = relative = 0.0
    for name, want in expected.items():
        got = results[name]
        where = f"output {name!r} ({case}; {sizes})"
        if got.shape != want.shape:
            raise ParityError(f"{where} has shape {got.shape} in {runtime} and {want.shape} in torch")
        if not want.size:
            continue
        if want.dtype.kind not in "fc":
            if not np.array_equal(got, want):
                raise ParityError(f"{where} differs in {int((got != want).sum())} of {want.size} integers")
            continue
        got, want = got.astype(np.float64), want.astype(np.float64)
        if np.isnan(got).any() or np.isnan(want).any():
            raise ParityError(f"{where} is NaN in {'torch' if np.isnan(want).any() else runtime}")
        # Infinities (masked logits) must agree exactly; only finite numbers have a distance.
        finite = np.isfinite(want)
        if not np.array_equal(got[~finite], want[~finite]) or not np.isfinite(got[finite]).all():
            raise ParityError(f"{where} is infinite in other places in {runtime} than in torch")
        difference = float(np.abs(got[finite] - want[finite]).max(initial=0.0))
        scale = float(np.abs(want[finite]).max(initial=0.0)) or 1.0
        if difference > tolerance * scale:
            raise ParityError(
                f"{where} differs from torch by {difference:.3g}, {difference / scale:.3g} of its largest value; "
                f"the tolerance is {tolerance:.3g}"
            )
        absolute, relative = max(absolute, difference), max(relative, difference / scale)
    return Parity(case, sizes, absolute, relative)
