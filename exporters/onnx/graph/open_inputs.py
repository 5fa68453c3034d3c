"""Initializers of an exported graph made inputs that may be left out: what an adapter swaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ....backends.artifact.signature import free_name
from ....rewriter.errors import ExportError, near_misses
from ....rewriter.forms import SLOTS


@dataclass(frozen=True)
class Opened:
    """A tensor of a graph that becomes an input: the initializer's name until then, the input's shape, with a string
    for every free dimension, its default, and the site it is a factor of (None: a tensor trained in whole)."""

    key: str
    shape: tuple[int | str, ...]
    default: torch.Tensor
    site: str | None = None


def open_sites(model: Any, sites: Mapping[str, Mapping[str, Opened]], ids: Any = None) -> dict[str, Opened]:
    """Turn the adapter tensors of every site into graph inputs `<site>.<leg>`.

    The last leg of a site is the right factor of its last product. What lies between the legs and that product forgets
    the sizes it was traced with. Where the legs are stacks, `ids` is the input that chooses the rows.
    """
    opened: dict[str, Opened] = {}
    for site, legs in sites.items():
        values = {}
        for leg, one in legs.items():
            value = model.graph.initializers.get(one.key)
            if value is None or not value.uses():
                raise ExportError(
                    f"site {site!r} cannot be swapped in the exported graph: the model does not use its {leg}. Where "
                    "the forward does not come to this layer, leave it out of the targets (fg.Spec(exclude=[...]))"
                )
            name = f"{site}.{leg}"
            _release(model.graph, value, name, one.shape)
            opened[name], values[leg] = replace(one, site=site), value
        _forget_sizes(model.graph, site, values, ids)
    return opened


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
            _free_reshape(graph, node, right=leg == last_leg)
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


def _free_reshape(graph: Any, node: Any, right: bool) -> None:
    """Make a reshape forget a leg's size: one that joins two dimensions (the last two, or the two before the last of a
    right factor), or one that makes kernels of a factor, the first dimension being the leg's."""
    import onnx_ir as ir

    before, after = node.inputs[0].shape, node.outputs[0].shape
    assert before is not None and after is not None, node
    if len(after) > len(before):
        sizes = [-1, *(int(size) for size in after[1:])]
    else:
        assert len(after) == len(before) - 1, node
        sizes = [0] * (len(after) - 2) + [-1, int(after[-1])] if right else [0] * (len(after) - 1) + [-1]
    name = free_name(f"{node.name}.shape", graph.initializers)  # a layer may be called twice
    shape = ir.Value(name=name, const_value=ir.tensor(np.array(sizes, dtype=np.int64)))
    shape.dtype, shape.shape = ir.DataType.INT64, ir.Shape([len(sizes)])
    graph.register_initializer(shape)
    node.replace_input_with(1, shape)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def open_trained(
    model: Any, defaults: Mapping[str, torch.Tensor], keys: Mapping[str, str] | None = None
) -> dict[str, Opened]:
    """Turn initializers into graph inputs of these names with these defaults; `keys` has what they are called before,
    where that is something else."""
    opened: dict[str, Opened] = {}
    for name, tensor in defaults.items():
        opened[name] = one = Opened((keys or {}).get(name, name), tuple(tensor.shape), tensor.detach())
        _release(model.graph, _found(model.graph, one.key, "trained tensor"), name)
    return opened


def open_stacks(model: Any, stacks: Mapping[str, tuple[str, torch.Tensor]], ids: Any) -> dict[str, Opened]:
    """Turn the initializers called like the keys of `stacks` into inputs `(slots, ...)` of the given name and default,
    whose rows the input `ids` chooses."""
    opened: dict[str, Opened] = {}
    for key, (name, tensor) in stacks.items():
        value = model.graph.initializers.get(key)
        if value is None or not value.uses():
            raise ExportError(f"the stack {name!r} is not used by the exported graph")
        opened[name] = Opened(key, (SLOTS, *tensor.shape[1:]), tensor)
        _release(model.graph, value, name, opened[name].shape)
        for use in value.uses():
            owner, leg, _ = name.rsplit(".", 2)
            use.node.name = f"{owner}/{leg}/{use.node.op_type}"
            use.node.replace_input_with(1, ids)
    return opened


def pin(model: Any, keys: Sequence[str]) -> None:
    """Keep initializers as they are through the optimizer, until `unpin`: values that others are told to look at."""
    for key in keys:
        _release(model.graph, _found(model.graph, key, "tensor"), key)


def unpin(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give pinned initializers their values back."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in tensors]:
        graph.inputs.remove(value)
        _give_back(graph, value, tensors[value.name])


def _found(graph: Any, key: str, what: str) -> Any:
    if key not in graph.initializers:
        hint = ", ".join(near_misses(key, graph.initializers)) or "nothing like it"
        raise ExportError(f"the {what} {key!r} is no initializer of the exported graph (it has {hint})")
    return graph.initializers[key]


def _release(graph: Any, value: Any, name: str, shape: Sequence[int | str] | None = None) -> None:
    """Make an initializer a plain input. It gets its default back in `close`, after the optimizer: rewrite rules look
    at the values of initializers even where those can be overridden, and drop a bias that happens to be zero."""
    import onnx_ir as ir

    graph.initializers.pop(value.name)
    value.const_value = None
    value.name = name
    if shape is not None:
        value.shape = ir.Shape(list(shape))
    graph.inputs.append(value)


def _give_back(graph: Any, value: Any, tensor: torch.Tensor) -> None:
    from onnx_ir.tensor_adapters import TorchTensor

    value.const_value = TorchTensor(tensor.detach(), name=value.name)
    graph.initializers[value.name] = value


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
        _give_back(graph, value, opened[value.name].default)
        node = ir.node("Identity", [value], name=f"{value.name.replace('.', '/')}/given")
        given = node.outputs[0]
        given.name, given.type, given.shape = f"{value.name}.given", value.type, value.shape
        value.replace_all_uses_with(given, replace_graph_outputs=True)
        node.replace_input_with(0, value)
        graph.insert_before(graph[0], node)
