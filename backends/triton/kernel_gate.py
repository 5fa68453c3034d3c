"""When a kernel is worth its call: seconds of one adapter, with the base's product beside it, in both ways.

A site takes the longer of what the host needs to ask for it and what the GPU needs to do it. Without CUDA graphs a
kernel of ours is asked for from Python, which few rows do not hide; with them the host asks once for the whole model.
Every constant is an estimate (data sheets, and launches timed elsewhere), not measured here: `benchmarks/gpu.py`
measures both ways, and `fg.compile(kernels=...)` overrules the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...passes.graph.cost import Verdict, machine

_TENSOR_CORES = 312e12  # operations a second of 16-bit products, A100
_RAMP = 3e-6  # seconds no kernel is faster than
_ASK_ATEN = 8e-6  # seconds of the host for one operator in compiled code
_ASK_OURS = 45e-6  # the same for an operator of ours with its launches, from Python
_SHARE = 0.75  # of the memory's speed that a kernel of ours reaches, where a library product counts as reaching it


@dataclass(frozen=True)
class Sizes:
    """One adapter's call: `rows` of `inner` down to `rank` numbers and up to `out`.

    Args:
        rows: may be symbolic or unknown (None).
        samples: with adapters of their own; 1 where all rows have one.
        itemsize: of x; factor: of the factors, in bytes.
    """

    rows: int | torch.SymInt | None
    inner: int
    out: int
    rank: int
    samples: int
    itemsize: int
    factor: int


@dataclass(frozen=True)
class Form:
    """One way to do it: kernels the GPU runs, seconds the host needs to ask for them, bytes moved."""

    kernels: int
    host: float
    bytes: float


def row_bytes(s: Sizes, rows: int, sums: int) -> float:
    """x read once and the output passed over `sums` times."""
    return float(rows * (s.inner + sums * s.out) * s.itemsize)


def ours(s: Sizes, rows: int, factors: float, kernels: int = 2) -> Form:
    """Our way: x and the base's output are read, the result written, `factors` bytes of tensors read."""
    return Form(kernels, _ASK_OURS, (row_bytes(s, rows, 2) + factors) / _SHARE)


def aten(kernels: int, moved: float) -> Form:
    return Form(kernels, kernels * _ASK_ATEN, moved)


def decide(s: Sizes, rows: int, text: str, kernel: Form, library: Form, graphed: bool) -> Verdict:
    """Whether the kernel is faster."""
    m = machine("cuda")
    speed = _TENSOR_CORES if s.itemsize < 4 else m.flops
    base = max(_RAMP, s.inner * s.out * s.itemsize / m.bytes, 2 * rows * s.inner * s.out / speed)

    def seconds(form: Form) -> float:
        device = base + max(form.kernels * _RAMP, form.bytes / m.bytes)
        return device if graphed else max(device, _ASK_ATEN + form.host)

    mine, other = seconds(kernel), seconds(library)
    how = "CUDA graphs" if graphed else "no CUDA graphs"
    reason = f"{text}, {how}; with the base's product {mine * 1e6:.0f} us by the kernel, {other * 1e6:.0f} by ATen"
    return Verdict(mine < other, reason)
