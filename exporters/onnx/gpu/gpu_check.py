"""`check_gpu`: which nodes of a graph onnxruntime's CUDA provider has no kernel for, read off a table of its kernels.

onnxruntime runs such a node on the CPU without a word, with a copy of its tensors before and after. No GPU is needed to
ask.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....rewriter.errors import SessionError
from .cuda_kernels import ONNX, Kernels, cuda_kernels
from .gpu_report import GpuNode, GpuReport

# Of onnxruntime's rule for what stays on the CPU: an initializer of at most so many numbers may take part in it.
_SMALL = 100
# These read sizes on the CPU and make data on the device: where shape arithmetic ends.
_MAKE_DATA = frozenset({"Range", "ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "OneHot"})
_INTEGERS = frozenset({"int64", "int32", "bool"})
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})


def check_gpu(path: str | os.PathLike[str]) -> GpuReport:
    """Report every node of an ONNX graph that onnxruntime would run on the CPU beside `CUDAExecutionProvider`.

    Covers nodes inside functions (which onnxruntime inlines) and in the branches and bodies of If, Loop and Scan. A
    node has a kernel where operator, version and dtypes are in the table; limits a kernel checks only when it is built
    (attributes, ranks) are not. Weights are not read, so the size of a model does not matter. The rule for what is
    shape arithmetic follows onnxruntime's: computed from the sizes of tensors and small constants alone.

    Raises `SessionError` where there is no file or it holds no ONNX graph.
    """
    model, opsets = _read(Path(path))
    checker = _Checker(opsets, cuda_kernels())
    checker.walk(model.graph, {}, "")
    return GpuReport(
        Path(path),
        "CUDAExecutionProvider",
        checker.kernels.release,
        opsets.get("", 0),
        checker.nodes,
        *(tuple(checker.found[kind]) for kind in ("fallback", "shape", "unchecked")),
    )


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
    opsets = {"" if entry.domain in ONNX else entry.domain: entry.version for entry in model.opset_import}
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
    def __init__(self, opsets: Mapping[str, int], kernels: Kernels) -> None:
        self.opsets, self.kernels = opsets, kernels
        self.nodes = 0
        self.found: dict[str, list[GpuNode]] = {"fallback": [], "shape": [], "unchecked": []}

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
        onnx = node.domain in ONNX
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
        domain = "" if node.domain in ONNX else node.domain
        version, dtypes, unknown = self._signature(node, domain, values)
        operator = node.op_type if not domain else f"{domain}.{node.op_type}"

        def add(kind: str, reason: str) -> None:
            self.found[kind].append(GpuNode(node.name, operator, version, dtypes, reason, where))

        if kind == "shape":
            if node.op_type not in ("Shape", "Size"):  # those have kernels that leave their result on the CPU
                add("shape", "computes with sizes")
        elif missing := self.kernels.missing(domain, node.op_type, version, dtypes):
            add("fallback", missing)
        elif self.kernels.depends_on(domain, node.op_type, version, unknown):
            add("unchecked", f"the dtype of {', '.join(unknown)} is not in the file")

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
