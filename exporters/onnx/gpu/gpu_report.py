"""What `check_gpu` found: nodes that stay on the CPU beside onnxruntime's CUDA provider."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class GpuNode:
    """One node of the report. `where` is the subgraph it is in ("" for the graph itself); `version` is the operator's
    own (the opset that last changed it), `dtypes` those bound to its type variables, `reason` why it is listed."""

    name: str
    operator: str
    version: int
    dtypes: dict[str, str]
    reason: str
    where: str = ""

    def __str__(self) -> str:
        types = ", ".join(f"{variable} {dtype}" for variable, dtype in self.dtypes.items())
        place = f" in {self.where}" if self.where else ""
        return f"{self.operator} version {self.version} {self.name!r}{place}{f' ({types})' if types else ''}: " + (
            self.reason
        )


@dataclass(frozen=True)
class GpuReport:
    """What `check_gpu` found. `ok` where onnxruntime needs the CPU for shape arithmetic alone.

    fallbacks         nodes without a CUDA kernel: each costs a copy to the CPU and back.
    shape_arithmetic  nodes on a few whole numbers computed from sizes, which onnxruntime puts on the CPU on purpose,
                      kernel or not: the kernels that use the numbers want them there.
    unchecked         nodes whose operator has kernels, but whose dtypes the file does not tell.
    release           the onnxruntime whose kernels were looked up; other releases may have more or fewer.
    """

    path: Path
    provider: str
    release: str
    opset: int
    nodes: int
    fallbacks: tuple[GpuNode, ...] = field(default=())
    shape_arithmetic: tuple[GpuNode, ...] = field(default=())
    unchecked: tuple[GpuNode, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.fallbacks and not self.unchecked

    def __str__(self) -> str:
        counts = {"fall back to the CPU": len(self.fallbacks), "are of unknown dtypes": len(self.unchecked)}
        verdict = ", ".join(f"{n} {what}" for what, n in counts.items() if n) or f"all run on {self.provider}"
        lines = [f"{self.path}: {self.nodes} nodes, opset {self.opset}: {verdict} ({self.release})"]
        lines += [f"  {title:<9} {node}" for title, node in self._listed()]
        if self.shape_arithmetic:
            counts = Counter(node.operator for node in self.shape_arithmetic)
            kinds = ", ".join(f"{n} {operator}" for operator, n in counts.most_common())
            lines.append(f"  on purpose {len(self.shape_arithmetic)} nodes of shape arithmetic on the CPU: {kinds}")
        return "\n".join(lines)

    def _listed(self) -> Iterator[tuple[str, GpuNode]]:
        yield from (("fallback", node) for node in self.fallbacks)
        yield from (("unknown", node) for node in self.unchecked)
