"""Names in an exported graph: of axes, inputs, outputs and nodes; nothing else in it changes."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from ....backends.artifact.signature import Axes, free_name
from ....rewriter.errors import ExportError


def rename_axes(model: Any, names: Mapping[str, str]) -> None:
    """Give torch's symbols (`s72`) the names of their axes in every shape of the graph, inside expressions too."""
    import onnx_ir as ir

    plain = {symbol: label for symbol, label in names.items() if re.fullmatch(r"\w+", symbol)}
    word = re.compile(r"\b(" + "|".join(map(re.escape, plain)) + r")\b") if plain else None
    # One name for a sum, in whatever order torch writes it.
    sums = {frozenset(label.split(" + ")): label for label in names.values() if " + " in label}

    def renamed(dim: Any) -> int | str | None:
        dim = dim if isinstance(dim, int) else getattr(dim, "value", None)
        if not isinstance(dim, str):
            return dim
        if dim.isdigit():  # a size that torch fixed in the end
            return int(dim)
        dim = word.sub(lambda m: plain[m[1]], dim) if word else dim
        return sums.get(frozenset(dim.split(" + ")), dim)

    for value in _values(model.graph):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def name_ends(
    model: Any, inputs: Mapping[str, str], outputs: Sequence[str], opened: Container[str]
) -> dict[str, dict[str, str]]:
    """Call the graph's inputs and outputs by the model's names; one tensor returned twice gets a copy.

    `inputs` are the model's names by the graph's own until now, `opened` the adapter inputs, which keep their names, as
    weights do. Where those, or an input, have the name of an input or output already, that end gets another one:
    returns {"inputs": {model's name: the graph's}, "outputs": ...} of those. Values inside the graph make way.
    """
    import onnx_ir as ir

    graph = model.graph
    if len(graph.outputs) != len(outputs):
        raise ExportError(f"the graph has {len(graph.outputs)} outputs, the model {len(outputs)}: {', '.join(outputs)}")
    done: set[int] = set()
    for index, value in enumerate(graph.outputs):
        if id(value) in done or value.producer() is None:
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = value = copy
        done.add(id(value))
    fixed = {*graph.initializers, *(value.name for value in graph.inputs if value.name not in inputs)}
    renamed: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}}
    named: dict[str, Any] = {}
    ends = [(value, inputs[value.name], "inputs") for value in graph.inputs if value.name in inputs]
    ends += [(value, name, "outputs") for value, name in zip(graph.outputs, outputs, strict=True)]
    wanted = {*inputs.values(), *outputs}
    for value, name, side in ends:
        its = name
        if name in fixed or name in named:
            its = free_name(f"{name}.{side.removesuffix('s')}", {*fixed, *named, *wanted})
            renamed[side][name] = its
        named[its] = value
    for inner in [value for node in graph.all_nodes() for value in node.outputs]:
        if inner.name in named and named[inner.name] is not inner:
            inner.name = None  # onnx_ir gives it one that is free when the model is written
    for name, value in named.items():
        value.name = name
    _name_the_rest(graph, {*fixed, *named})
    return {side: names for side, names in renamed.items() if names}


def name_axes(model: Any, axes: Axes, renamed: Mapping[str, str]) -> None:
    """Name axes of outputs whose sizes the trace does not tell, by the model's names of the outputs."""
    import onnx_ir as ir

    outputs = {value.name: value for value in model.graph.outputs}
    for name, named in axes.items():
        value = outputs[renamed.get(name, name)]
        value.shape = ir.Shape([named.get(axis, dim) for axis, dim in enumerate(value.shape)])


def _name_the_rest(graph: Any, taken: set[str]) -> None:
    """Give every value inside the graph a name of its own."""
    for value in [value for node in graph.all_nodes() for value in node.outputs]:
        if value.is_graph_output() or value.name == "":
            continue
        if value.name is None or value.name in taken:
            value.name = free_name(f"{value.name or 'value'}.inner", taken)
        taken.add(value.name)


def tidy(model: Any) -> None:
    """Node names a reader can follow, `<module path>/<operator>`, and nothing of the machine the file was made on.

    The exporter's notes go (they quote source lines with absolute paths), but for the `namespace` viewers group by.
    """
    graph = model.graph
    counts: dict[str, int] = {}
    for node in graph:
        if "/" not in (node.name or ""):
            node.name = f"{_module_path(node)}/{node.op_type}"
        counts[node.name] = counts.get(node.name, -1) + 1
        if counts[node.name]:
            node.name = f"{node.name}_{counts[node.name]}"
        namespace = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        if namespace:
            node.metadata_props["namespace"] = namespace
    for value in _values(graph):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _module_path(node: Any) -> str:
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module"):
        return scopes[-2]  # the last scope is the operator itself
    # Nodes the optimizer made have no scope; the tensors they read tell where they belong.
    for value in node.inputs:
        if value is not None and value.is_initializer() and "." in value.name:
            return value.name.removesuffix(".T").rpartition(".")[0]
    return "model"


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
