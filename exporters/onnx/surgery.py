"""Surgery on the exported graph, with onnx_ir: names of axes, outputs and nodes, and tensors that can be swapped."""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.artifact.signature import free_name
from ...rewriter.errors import ExportError, near_misses
from .weight_files import SMALL, lay_out

# protobuf ends at 2 GiB; beyond this the weights go to a file of their own.
INLINE_BYTES = 1_500_000_000


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's remarks (missing torchvision, renamed symbols, skipped deduplication) off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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


def _name_the_rest(graph: Any, taken: set[str]) -> None:
    """Give every value inside the graph a name of its own."""
    for value in [value for node in graph.all_nodes() for value in node.outputs]:
        if value.is_graph_output() or value.name == "":
            continue
        if value.name is None or value.name in taken:
            value.name = free_name(f"{value.name or 'value'}.inner", taken)
        taken.add(value.name)


@dataclass(frozen=True)
class Opened:
    """A graph input with a default: its shape (a string where free) and the initializer that `close` gives it."""

    shape: tuple[int | str, ...]
    default: Any


@dataclass(frozen=True)
class Leg:
    """One adapter tensor of a site that is to become an input: the initializer's name, the input's shape with a string
    for every free dimension, and the default."""

    key: str
    shape: tuple[int | str, ...]
    default: torch.Tensor


def open_sites(model: Any, sites: Mapping[str, Mapping[str, Leg]], ids: Any = None) -> dict[str, Opened]:
    """Turn the adapter tensors of every site into graph inputs `<site>.<leg>`.

    The last leg of a site is the right factor of its last product. What lies between the legs and that product forgets
    the sizes it was traced with. Every site has symbols of its own: onnxruntime insists that equal symbols are equal
    numbers. Where the legs are stacks, `ids` is the input that chooses the rows.
    """
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    opened: dict[str, Opened] = {}
    for site, legs in sites.items():
        values = {}
        for leg, (key, shape) in {leg: (one.key, one.shape) for leg, one in legs.items()}.items():
            value = graph.initializers.get(key)
            if value is None or not value.uses():
                raise ExportError(
                    f"site {site!r} cannot be swapped in the exported graph: the model does not use its {leg}. Where "
                    "the forward does not come to this layer, leave it out of the targets (fg.Spec(exclude=[...]))"
                )
            name = f"{site}.{leg}"
            _release(graph, value, name)
            _set_shape(value, shape)
            opened[name] = Opened(tuple(shape), TorchTensor(legs[leg].default, name=name))
            values[leg] = value
        _forget_sizes(graph, site, values, ids)
    return opened


def _set_shape(value: Any, shape: Sequence[int | str]) -> None:
    import onnx_ir as ir

    value.shape = ir.Shape(list(shape))


def _forget_sizes(graph: Any, site: str, legs: Mapping[str, Any], ids: Any) -> None:
    """Let no node between the legs and their last product know the legs' sizes; name the nodes after the site."""
    *_, (last_leg, last_value) = legs.items()
    products = set()
    for use in last_value.uses():
        node = _down(use.node)
        if node is None:
            raise ExportError(
                f"site {site!r} cannot be swapped in the exported graph: {last_leg} is no factor of a plain product"
            )
        products.add(node)
    between: dict[Any, str] = {}  # node -> the leg that leads there; the last product included
    for leg, value in legs.items():
        waiting = [use.node for use in value.uses()]
        while waiting:
            node = waiting.pop(0)
            if node not in between:
                between[node] = leg
                if node not in products:
                    waiting += [use.node for output in node.outputs for use in output.uses()]
    for node, leg in between.items():
        node.name = _node_name(site, last_leg if node in products else leg, node)
        if node.op_type == "Gather" and ids is not None:
            node.replace_input_with(1, ids)
        if node.op_type == "Reshape":
            _merge_two(graph, node, right=leg == last_leg)
    for node, leg in between.items():
        if node in products:
            continue
        for output in node.outputs:
            output.shape = None
        if node.op_type == "MatMul":
            node.outputs[0].name = f"{site}.x{leg}"


def _node_name(site: str, leg: str, node: Any) -> str:
    return f"{site}/{leg}" if node.op_type in ("MatMul", "Gemm") else f"{site}/{leg}/{node.op_type}"


def _down(node: Any) -> Any:
    """The product that a right factor ends in, through what only selects, casts or reshapes it."""
    while node.op_type in ("Gather", "Cast", "Reshape"):
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1:
            return None
        node = users[0]
    return node if node.op_type in ("MatMul", "Gemm") else None


def _merge_two(graph: Any, node: Any, right: bool) -> None:
    """Make a reshape that joins two dimensions say so without numbers: the last two, or the two before the last of a
    right factor."""
    import onnx_ir as ir

    before, after = node.inputs[0].shape, node.outputs[0].shape
    assert before is not None and after is not None and len(after) == len(before) - 1, node
    sizes = [0] * (len(after) - 2) + [-1, int(after[-1])] if right else [0] * (len(after) - 1) + [-1]
    name = free_name(f"{node.name}.shape", graph.initializers)  # a layer may be called twice
    shape = ir.Value(name=name, const_value=ir.tensor(np.array(sizes, dtype=np.int64)))
    shape.dtype, shape.shape = ir.DataType.INT64, ir.Shape([len(sizes)])
    graph.register_initializer(shape)
    node.replace_input_with(1, shape)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def pin(model: Any, keys: Sequence[str]) -> None:
    """Keep initializers as they are through the optimizer, until `unpin`: values that others are told to look at."""
    graph = model.graph
    for key in keys:
        if key not in graph.initializers:
            hint = ", ".join(near_misses(key, graph.initializers)) or "nothing like it"
            raise ExportError(f"the tensor {key!r} is no initializer of the exported graph (it has {hint})")
        _release(graph, graph.initializers[key], key)


def unpin(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give pinned initializers their values back."""
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    for value in [value for value in graph.inputs if value.name in tensors]:
        graph.inputs.remove(value)
        value.const_value = TorchTensor(tensors[value.name].detach(), name=value.name)
        graph.initializers[value.name] = value


def open_trained(
    model: Any, defaults: Mapping[str, torch.Tensor], keys: Mapping[str, str] | None = None
) -> dict[str, Opened]:
    """Turn initializers into graph inputs of these names with these defaults; `keys` has what they are called before,
    where that is something else."""
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    opened: dict[str, Opened] = {}
    for name, tensor in defaults.items():
        key = (keys or {}).get(name, name)
        value = graph.initializers.get(key)
        if value is None:
            hint = ", ".join(near_misses(key, graph.initializers)) or "nothing like it"
            raise ExportError(f"the trained tensor {key!r} is no initializer of the exported graph (it has {hint})")
        _release(graph, value, name)
        opened[name] = Opened(tuple(tensor.shape), TorchTensor(tensor.detach(), name=name))
    return opened


def open_stacks(model: Any, stacks: Mapping[str, tuple[str, torch.Tensor]], ids: Any) -> dict[str, Opened]:
    """Turn the initializers called like the keys of `stacks` into inputs `(slots, ...)` of the given name and default,
    whose rows the input `ids` chooses."""
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    opened: dict[str, Opened] = {}
    for key, (name, tensor) in stacks.items():
        value = graph.initializers.get(key)
        if value is None or not value.uses():
            raise ExportError(f"the stack {name!r} is not used by the exported graph")
        _release(graph, value, name)
        shape = ("slots", *tensor.shape[1:])
        _set_shape(value, shape)
        opened[name] = Opened(shape, TorchTensor(tensor, name=name))
        for use in value.uses():
            owner, leg, _ = name.rsplit(".", 2)
            use.node.name = f"{owner}/{leg}/{use.node.op_type}"
            use.node.replace_input_with(1, ids)
    return opened


def refuse_negative_ids(model: Any, ids: Any) -> None:
    """Let a slot below 0 be an error of the runtime: a Gather counts negative indices from the end.

    Gather(stack, adapter_ids)  ->  Gather(stack, Where(adapter_ids < 0, no slot, adapter_ids))
    """
    import onnx_ir as ir

    graph = model.graph
    users = [use.node for use in ids.uses() if use.node.op_type == "Gather" and use.idx == 1]
    constants = []
    for leg, number in (("first", 0), ("none", 2**31 - 1)):
        name = f"{ids.name}.{leg}"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(number, dtype=np.int64), name=name))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([])
        graph.register_initializer(value)
        constants.append(value)
    below = ir.node("Less", [ids, constants[0]], name=f"{ids.name}/Less")
    there = ir.node("Where", [below.outputs[0], constants[1], ids], name=f"{ids.name}/Where")
    below.outputs[0].dtype, below.outputs[0].shape = ir.DataType.BOOL, ids.shape
    there.outputs[0].dtype, there.outputs[0].shape = ids.dtype, ids.shape
    graph.insert_before(graph[0], [below, there])
    for node in users:
        node.replace_input_with(1, there.outputs[0])


def _release(graph: Any, value: Any, name: str) -> None:
    """Make an initializer a plain input. It gets its default back in `close`, after the optimizer: rewrite rules look
    at the values of initializers even where those can be overridden, and drop a bias that happens to be zero."""
    graph.initializers.pop(value.name)
    value.const_value = None
    value.name = name
    graph.inputs.append(value)


def close(model: Any, opened: Mapping[str, Opened]) -> None:
    """Give the opened inputs their defaults: from here on they may be left out.

        MatMul(x, A)  ->  MatMul(x, Identity(A))

    A quantiser takes an initializer that a product reads for a constant, and not what another node gives. onnxruntime
    drops the Identity when it loads the graph.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in graph.inputs:
        if value.name not in opened:
            continue
        value.const_value = opened[value.name].default
        graph.initializers[value.name] = value
        node = ir.node("Identity", [value], name=f"{value.name.replace('.', '/')}/given")
        given = node.outputs[0]
        given.name, given.type, given.shape = f"{value.name}.given", value.type, value.shape
        value.replace_all_uses_with(given, replace_graph_outputs=True)
        node.replace_input_with(0, value)
        graph.insert_before(graph[0], node)


def widen_convolutions(model: Any) -> None:
    """Compute bfloat16 convolutions in float32: before opset 22 ONNX has none, and onnxruntime has kernels for none.

    Conv(x, w)  ->  Cast(Conv(Cast(x), Cast(w)))
    """
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose") or node.outputs[0].dtype is not narrow:
            continue
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            cast = ir.node("Cast", [value], {"to": int(wide)}, metadata_props=node.metadata_props)
            cast.outputs[0].dtype, cast.outputs[0].shape = wide, value.shape
            model.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        result = node.outputs[0]
        back = ir.node("Cast", [result], {"to": int(narrow)}, metadata_props=node.metadata_props)
        back.outputs[0].dtype, back.outputs[0].shape = narrow, result.shape
        result.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
        back.replace_input_with(0, result)
        result.dtype = wide
        model.graph.insert_after(node, back)


def name_transposes(model: Any) -> dict[str, torch.Tensor]:
    """Turn a transposed weight into an initializer `<weight>.T` that reads the weight's own memory.

        Transpose(w)  ->  w.T

    The optimizer would fold it too, with a copy of every weight in memory and a name of its own making. A weight that
    is also used as it stands (an embedding tied to the head) keeps its Transpose, or the file would have it twice: it
    stays an input until `unpin`, which takes what this returns.
    """
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    kept: dict[str, torch.Tensor] = {}
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" else None
        if value is None or not value.is_initializer() or value.is_graph_input():
            continue
        stored = getattr(value.const_value, "raw", None)
        if not isinstance(stored, torch.Tensor) or list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
            continue
        if any(use.node.op_type != "Transpose" for use in value.uses()) and stored.nbytes > SMALL:
            kept[value.name] = stored
            continue
        name, result = f"{value.name}.T", node.outputs[0]
        turned = graph.initializers.get(name)  # a weight may be transposed in two places
        if turned is None:
            turned = ir.Value(name=name, const_value=TorchTensor(stored.detach().t(), name=name))
            turned.dtype, turned.shape = value.dtype, result.shape
            graph.register_initializer(turned)
        result.replace_all_uses_with(turned, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not value.uses():
            graph.initializers.pop(value.name)
    pin(model, list(kept))
    return kept


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


def save(
    model: Any, path: Path, external_data: bool | None, folder: Path, forms: Mapping[str, torch.Tensor]
) -> dict[Path, Path]:
    """Write the model; where protobuf cannot hold the weights, they go to files called after their content.

    `folder` is where the graph goes in the end, `forms` are the base model's tensors; returns files for `weights.link`.
    """
    import onnx_ir as ir

    outside = weight_bytes(model) > INLINE_BYTES if external_data is None else external_data
    links = lay_out(model, path.parent, folder, forms) if outside else {}
    ir.save(model, path)
    return links


def weight_bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
