"""The kernels of onnxruntime's CUDA provider, as it publishes them for one release: `ort_cuda_kernels.json`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONNX = ("", "ai.onnx")  # the domain of ONNX's own operators
_TABLE = Path(__file__).with_name("ort_cuda_kernels.json")
Kernel = Mapping[str, Any]


@dataclass(frozen=True)
class Kernels:
    """Kernels by domain and operator: the versions and, per type variable, the dtypes each is for."""

    release: str
    table: Mapping[tuple[str, str], Sequence[Kernel]]

    def missing(self, domain: str, operator: str, version: int, dtypes: Mapping[str, str]) -> str:
        """Why there is no kernel for these dtypes; "" where there is one."""
        kernels = self.table.get((domain, operator), ())
        if not kernels:
            return "the operator has no kernel"
        fitting = [kernel for kernel in kernels if _covers(kernel, version)]
        if not fitting:
            spans = sorted({_span(kernel) for kernel in kernels}, key=lambda span: int(span.split("-")[0]))
            return f"kernels exist for versions {', '.join(spans)}"
        misfits = [_misfit(kernel["types"], dtypes) for kernel in fitting]
        return f"no kernel for {misfits[0]}" if all(misfits) else ""

    def depends_on(self, domain: str, operator: str, version: int, variables: Sequence[str]) -> bool:
        """Whether the dtypes of any of these type variables decide if there is a kernel."""
        fitting = [kernel for kernel in self.table.get((domain, operator), ()) if _covers(kernel, version)]
        return any(variable in kernel["types"] for kernel in fitting for variable in variables)


@functools.cache
def cuda_kernels() -> Kernels:
    read = json.loads(_TABLE.read_text(encoding="utf-8"))
    kernels: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in read["kernels"]:
        domain = "" if kernel["domain"] in ONNX else kernel["domain"]
        kernels.setdefault((domain, kernel["op"]), []).append(kernel)
    return Kernels(read["release"], kernels)


def _covers(kernel: Kernel, version: int) -> bool:
    """onnxruntime's rule: an open-ended kernel is for the version it names; a closed one for all in its range."""
    since, until = kernel["since"], kernel["until"]
    return since == version or (until is not None and since < version <= until)


def _span(kernel: Kernel) -> str:
    since, until = kernel["since"], kernel["until"]
    return f"{since}" if until is None or until == since else f"{since}-{until}"


def _misfit(types: Mapping[str, Sequence[str]], dtypes: Mapping[str, str]) -> str:
    for variable, dtype in dtypes.items():
        if variable in types and dtype not in types[variable]:
            return f"{variable} {dtype} (there is one for {', '.join(types[variable])})"
    return ""
