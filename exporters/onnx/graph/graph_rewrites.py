"""Rewrites of an exported graph that change nodes: what each does is its A -> B line."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .open_inputs import pin
from .weight_files import SMALL


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
