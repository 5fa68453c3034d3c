"""Does what was written compute what torch computes? The rule, for whichever runtime runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...rewriter.errors import ExportError, ParityError
from .signature import named_tensors
from .wide_oracle import widely

# Largest difference over the largest magnitude of an output. float32 leaves room for some thirty layers whose sums
# another runtime orders differently; one layer differs by 1e-7.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


# Where the truth is known: a runtime may be as many times further from it than torch is (sums in another order), or as
# far as the floor of the output's largest value, whichever is more; and never further than the last, whatever torch is.
# Torch's own error on one input may be small by luck, and so may the output, the more easily the fewer numbers there
# are: before a result is called wrong, error and size on other inputs count too.
MULTIPLE = 10.0
FLOORS = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 5e-2}
_NEVER = 0.1

Truth = Callable[[], Mapping[str, np.ndarray] | None]
Noise = Callable[[], Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Parity:
    """One comparison of a runtime with torch: what was run, and the largest difference over all outputs.

    `absolute` is max |runtime - torch|; `relative` is that over the largest |torch| of the same output. `allowed` is
    the limit it was held to, relative too. Where the float64 result had to be computed, `error` is the runtime's
    distance from it and `torch_error` torch's own, both relative; elsewhere they are None.
    """

    case: str
    sizes: str
    absolute: float
    relative: float
    allowed: float = 0.0
    error: float | None = None
    torch_error: float | None = None


def tolerance_of(model: torch.nn.Module) -> float:
    """The tolerance for the least precise floating dtype among the model's parameters (float32 without any)."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & set(TOLERANCES)
    return max((TOLERANCES[dtype] for dtype in dtypes), default=TOLERANCES[torch.float32])


def floor_of(model: torch.nn.Module) -> float:
    """The floor of `FLOORS` for the least precise floating dtype among the model's parameters."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & set(FLOORS)
    return max((FLOORS[dtype] for dtype in dtypes), default=FLOORS[torch.float32])


def sizes_of(inputs: Mapping[str, Any]) -> str:
    """`input_ids 3x8, scale scalar`: the shapes of arrays or tensors, for a text."""
    return ", ".join(f"{name} {'x'.join(map(str, value.shape)) or 'scalar'}" for name, value in inputs.items())


def reference(
    model: torch.nn.Module, inputs: Mapping[str, Any], case: str, dtype: torch.dtype | None = None
) -> dict[str, np.ndarray]:
    """The model's named outputs for keyword `inputs`, as arrays on the CPU, computed in `dtype` (None: as the model
    does), see `wide_oracle`. Raises `ExportError` if it does not run."""
    try:
        with torch.no_grad():
            output = model(**inputs) if dtype is None else widely(model, inputs, dtype)
    except Exception as error:  # whatever the model raises on unfit inputs is the caller's to read
        raise ExportError(
            f"the model runs on the example but not on other sizes ({case}): {type(error).__name__}: {error}. "
            "Fix the axes it cannot change with dynamic_shapes (dynamic_shapes={} fixes every axis)"
        ) from error
    return {name: array(tensor) for name, tensor in named_tensors(output, dropped={}).items()}


def noise_of(results: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Of the floating outputs: how far they are from the right ones at most, and the largest of these; finite ones."""
    found = {}
    for name, value in right.items():
        if value.dtype.kind in "fc" and value.shape == results[name].shape:
            off, size = np.abs(results[name].astype(value.dtype) - value), np.abs(value)
            found[name] = float(off[np.isfinite(off)].max(initial=0.0)), float(size[np.isfinite(size)].max(initial=0.0))
    return found


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
    truth: Truth | None = None,
    otherwise: float = 0.0,
    noise: Noise | None = None,
) -> Parity:
    """Hold every output of a runtime against torch's.

    Without `truth`, floats may differ from torch's by `tolerance` of the output's largest value. With it, `tolerance`
    is the floor below which rounding is not worth a question; a larger difference is judged by the float64 result that
    `truth` gives: the runtime may be `MULTIPLE` times as far from it as torch is. Where it gives None, as no such
    result can be computed, the difference from torch may be `otherwise`. `noise` gives, for every floating output and
    over other inputs, the largest distance of torch from the float64 result, and the largest value of that; it is asked
    where a result would else be refused.

    Raises `ParityError` naming the output, the sizes and the figure where shapes differ, integers are not equal, a
    number is NaN, or the difference exceeds what is allowed.
    """
    known: Mapping[str, np.ndarray] | None = None
    found = [0.0, 0.0, tolerance]
    judged: list[tuple[float, float]] = []
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
        wide = np.complex128 if want.dtype.kind == "c" else np.float64
        got, want = got.astype(wide), want.astype(wide)
        if np.isnan(got).any() or np.isnan(want).any():
            raise ParityError(f"{where} is NaN in {'torch' if np.isnan(want).any() else runtime}")
        # Infinities (masked logits) must agree exactly; only finite numbers have a distance.
        finite = np.isfinite(want)
        if not np.array_equal(got[~finite], want[~finite]) or not np.isfinite(got[finite]).all():
            raise ParityError(f"{where} is infinite in other places in {runtime} than in torch")
        difference = float(np.abs(got[finite] - want[finite]).max(initial=0.0))
        scale = float(np.abs(want[finite]).max(initial=0.0)) or 1.0
        allowed, why = tolerance, f"the tolerance is {tolerance:.3g}"
        error = difference / scale
        if truth is not None and error > tolerance:
            known = truth() if known is None else known
        if known is not None and error > tolerance:
            right = known[name].astype(wide)[finite]
            error, own = (float(np.abs(value[finite] - right).max(initial=0.0)) / scale for value in (got, want))
            if noise is not None and error > min(MULTIPLE * own, _NEVER):
                usual, largest = noise().get(name, (0.0, 0.0))
                error, own = (one * scale / max(scale, largest) for one in (error, own))
                scale = max(scale, largest)
                own = max(own, usual / scale)
            allowed = min(max(MULTIPLE * own, tolerance), _NEVER)
            why = f"it may be {allowed:.3g} from the float64 result and is {error:.3g}, torch is {own:.3g}"
            judged.append((error, own))
        elif truth is not None and error > tolerance:
            allowed = max(otherwise, tolerance)
            why = f"the tolerance is {allowed:.3g}, as the model does not run in float64"
        if not error <= allowed:
            raise ParityError(
                f"{where} differs from torch by {difference:.3g}, {difference / scale:.3g} of its largest value; {why}"
            )
        found = [max(pair) for pair in zip(found, (difference, difference / scale, allowed), strict=True)]
    errors = [max(pair) for pair in zip(*judged, strict=True)] if judged else [None, None]
    return Parity(case, sizes, *found, *errors)
