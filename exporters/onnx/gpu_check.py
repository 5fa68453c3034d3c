"""`check_gpu`: which nodes of a graph onnxruntime's CUDA provider has no kernel for, read off a table of its kernels.

onnxruntime runs such a node on the CPU without a word, with a copy of its tensors before and after. The table
(`ort_cuda_kernels.json`) is what onnxruntime publishes for one release, so no GPU is needed to ask.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...rewriter.errors import SessionError

_TABLE = Path(__file__).with_name("ort_cuda_kernels.json")
_ONNX = ("", "ai.onnx")
# Of onnxruntime's rule for what stays on the CPU: an initializer of at most so many numbers may take part in it.
_SMALL = 100
# These read sizes on the CPU and make data on the device: where shape arithmetic ends.
_MAKE_DATA = frozenset({"Range", "ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "OneHot"})
_INTEGERS = frozenset({"int64", "int32", "bool"})
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})


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


def check_gpu(path: str | os.PathLike[str]) -> GpuReport:
    """Report every node of an ONNX graph that onnxruntime would run on the CPU beside `CUDAExecutionProvider`.

    Covers nodes inside functions (which onnxruntime inlines) and in the branches and bodies of If, Loop and Scan. A
    node has a kernel where operator, version and dtypes are in the table; limits a kernel checks only when it is built
    (attributes, ranks) are not. Weights are not read, so the size of a model does not matter. The rule for what is
    shape arithmetic follows onnxruntime's: computed from the sizes of tensors and small constants alone.

    Raises `SessionError` where there is no file or it holds no ONNX graph.
    """
    model, opsets = _read(Path(path))
    checker = _Checker(opsets, *_kernels())
    checker.walk(model.graph, {}, "")
    return GpuReport(
        Path(path),
        "CUDAExecutionProvider",
        checker.release,
        opsets.get("", 0),
        checker.nodes,
        tuple(checker.fallbacks),
        tuple(checker.shape_arithmetic),
        tuple(checker.unchecked),
    )


@functools.cache
def _kernels() -> tuple[str, dict[tuple[str, str], list[dict[str, Any]]]]:
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in table["kernels"]:
        domain = "" if kernel["domain"] in _ONNX else kernel["domain"]
        kernels.setdefault((domain, kernel["op"]), []).append(kernel)
    return table["release"], kernels


def _read(path: Path) -> tuple[Any, dict[str, int]]:
    """The graph with its functions inlined and every dtype filled in that can be known, and its opsets by domain."""
    import onnx
    from onnx import inliner, shape_inference

    if not path.is_file():
        raise SessionError(f"there is no graph {str(path)!r}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's classes differ from version to version
        raise SessionError(f"{str(path)!r} is no ONNX graph: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise SessionError(f"{str(path)!r} is no ONNX graph: it has no nodes and no outputs")
    opsets = {"" if entry.domain in _ONNX else entry.domain: entry.version for entry in model.opset_import}
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        model = shape_inference.infer_shapes(model)
    except Exception as error:  # onnx raises its own, RuntimeError and protobuf's
        raise SessionError(f"the graph in {str(path)!r} is not well-formed: {error}") from error
    return model, opsets


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor. `kind`: "constant", "shape" (computed from sizes, on the CPU) or "data"."""

    dtype: str | None
    rank: int | None
    kind: str
    small: bool = False


class _Checker:
    def __init__(
        self, opsets: Mapping[str, int], release: str, kernels: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
    ):
        self.opsets, self.release, self.kernels = opsets, release, kernels
        self.nodes = 0
        self.fallbacks: list[GpuNode] = []
        self.shape_arithmetic: list[GpuNode] = []
        self.unchecked: list[GpuNode] = []

    def walk(self, graph: Any, outer: Mapping[str, _Value], where: str) -> None:
        """Check a graph's nodes, which are in order; `outer` are the values of the graphs around it."""
        values = dict(outer)
        typed = {info.name: _typed(info.type) for info in (*graph.input, *graph.output, *graph.value_info)}
        inputs = {info.name for info in graph.input}
        for name in inputs:
            values[name] = _Value(*typed[name], "data")
        for tensor in graph.initializer:
            # One that is an input too can be given at run: data like any other.
            kind = "data" if tensor.name in inputs else "constant"
            size = math.prod(tensor.dims)
            values[tensor.name] = _Value(_dtype(tensor.data_type), len(tensor.dims), kind, size <= _SMALL)
        for node in graph.node:
            given = [values.get(name, _Value(None, None, "data")) for name in node.input if name]
            kind = self._kind(node, given, [typed.get(name, (None, None)) for name in node.output if name])
            small = kind == "constant" and (node.op_type == "Constant" or all(value.small for value in given))
            for name in node.output:
                values[name] = _Value(*typed.get(name, (None, None)), kind, small)
            self.nodes += 1
            if kind != "constant":
                self._check(node, values, where, kind)
            place = f"{where}/{node.name or node.op_type}" if where else node.name or node.op_type
            for attribute in node.attribute:
                for subgraph in (attribute.g, *attribute.graphs):
                    if subgraph.node:
                        self.walk(subgraph, values, f"{place}/{attribute.name}")

    def _kind(self, node: Any, given: Sequence[_Value], made: Iterable[tuple[str | None, int | None]]) -> str:
        onnx = node.domain in _ONNX
        has_graph = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        # onnxruntime computes these once, when it loads the graph
        if onnx and not has_graph and node.op_type not in _RANDOM and all(value.kind == "constant" for value in given):
            return "constant"
        if onnx and node.op_type in ("Shape", "Size"):
            return "shape"
        numbers = all(dtype in _INTEGERS and rank is not None and rank <= 1 for dtype, rank in made)
        from_sizes = any(value.kind == "shape" for value in given) and all(
            value.kind == "shape" or (value.kind == "constant" and value.small) for value in given
        )
        computed = numbers and from_sizes and not has_graph and node.op_type not in _MAKE_DATA
        return "shape" if onnx and computed else "data"

    def _check(self, node: Any, values: Mapping[str, _Value], where: str, kind: str) -> None:
        domain = "" if node.domain in _ONNX else node.domain
        version, dtypes, unknown = self._signature(node, domain, values)
        operator = node.op_type if not domain else f"{domain}.{node.op_type}"

        def entry(reason: str) -> GpuNode:
            return GpuNode(node.name, operator, version, dtypes, reason, where)

        if kind == "shape":
            if node.op_type not in ("Shape", "Size"):  # those have kernels that leave their result on the CPU
                self.shape_arithmetic.append(entry("computes with sizes"))
            return
        kernels = self.kernels.get((domain, node.op_type), ())
        fitting = [kernel for kernel in kernels if _covers(kernel, version)]
        if not fitting:
            spans = ", ".join(sorted({_span(kernel) for kernel in kernels}, key=lambda span: int(span.split("-")[0])))
            reason = f"kernels exist for versions {spans}" if kernels else "the operator has no kernel"
            self.fallbacks.append(entry(reason))
            return
        misfits = [_misfit(kernel["types"], dtypes) for kernel in fitting]
        if all(misfits):
            self.fallbacks.append(entry(f"no kernel for {misfits[0]}"))
        elif unknown and any(variable in kernel["types"] for kernel in fitting for variable in unknown):
            self.unchecked.append(entry(f"the dtype of {', '.join(unknown)} is not in the file"))

    def _signature(self, node: Any, domain: str, values: Mapping[str, _Value]) -> tuple[int, dict[str, str], list[str]]:
        """The operator's version, the dtypes of its type variables, and the variables whose dtype is not known."""
        import onnx

        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            # onnxruntime's own operators: all of version 1, with T for the first input
            first = values[node.input[0]].dtype if node.input and node.input[0] in values else None
            return 1, {"T": first} if first else {}, [] if first else ["T"]
        dtypes: dict[str, str] = {}
        unknown: list[str] = []
        variables = {constraint.type_param_str for constraint in schema.type_constraints}
        for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for index, name in enumerate(names):
                if not name or not formals:
                    continue
                formal = formals[min(index, len(formals) - 1)]  # the last one may be variadic
                variable = formal.type_str if formal.type_str in variables else formal.name
                dtype = values[name].dtype if name in values else None
                if dtype is not None:
                    dtypes.setdefault(variable, dtype)
                else:
                    unknown.append(variable)
        return schema.since_version, dtypes, [v for v in dict.fromkeys(unknown) if v not in dtypes]


def _covers(kernel: Mapping[str, Any], version: int) -> bool:
    """onnxruntime's rule: an open-ended kernel is for the version it names; a closed one for all in its range."""
    since, until = kernel["since"], kernel["until"]
    return since == version or (until is not None and since < version <= until)


def _span(kernel: Mapping[str, Any]) -> str:
    since, until = kernel["since"], kernel["until"]
    return f"{since}" if until is None or until == since else f"{since}-{until}"


def _misfit(types: Mapping[str, Sequence[str]], dtypes: Mapping[str, str]) -> str:
    for variable, dtype in dtypes.items():
        if variable in types and dtype not in types[variable]:
            return f"{variable} {dtype} (there is one for {', '.join(types[variable])})"
    return ""


def _typed(kind: Any) -> tuple[str | None, int | None]:
    """dtype and rank of a value, as the table writes dtypes; None for what the file does not tell."""
    if kind.HasField("tensor_type"):
        tensor = kind.tensor_type
        return _dtype(tensor.elem_type), len(tensor.shape.dim) if tensor.HasField("shape") else None
    if kind.HasField("sequence_type"):
        element, _ = _typed(kind.sequence_type.elem_type)
        return (f"seq(tensor({element}))" if element else None), None
    return None, None


def _dtype(number: int) -> str | None:
    import onnx

    return onnx.TensorProto.DataType.Name(number).lower() if number else None
