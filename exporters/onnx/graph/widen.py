"""A float32 form of a bfloat16 graph, for checking it where no kernel takes bfloat16.

onnxruntime's CPU provider has kernels for a handful of bfloat16 operators only. The widened graph reads the same
weights, bfloat16 as they are, and computes in float32: it says whether the graph and its weights are right, not how a
GPU rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def has_bfloat16(model: Any) -> bool:
    """Whether any weight, input or intermediate value of an onnx_ir model is bfloat16."""
    import onnx_ir as ir

    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs)]
    return any(value.dtype is ir.DataType.BFLOAT16 for value in values)


def widened(path: Path) -> bytes | None:
    """The float32 form of a bfloat16 graph, over the same external weights; None for other graphs.

        weight (bf16) -> Cast to float -> ...     input (bf16) -> input (float)     Cast to bf16 -> Cast to float

    Inputs, and weights that may be given as inputs, are float32 in it; so are the outputs.
    """
    import onnx_ir as ir

    model = ir.load(path)
    if not has_bfloat16(model):
        return None
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graph = model.graph
    inputs = {value.name for value in graph.inputs}
    for node in list(graph.all_nodes()):
        for value in node.outputs:
            if value.dtype is narrow:
                value.dtype = wide
        for attribute in list(node.attributes.values()):
            if attribute.type is ir.AttributeType.TENSOR and attribute.value.dtype is narrow:
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _float(attribute.value))
            elif (
                attribute.type is ir.AttributeType.INT
                and attribute.name in ("to", "dtype")
                and attribute.value == narrow
            ):
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(wide))
    for value in list(graph.initializers.values()):
        if value.dtype is not narrow:
            continue
        if value.name in inputs:
            value.const_value = _float(value.const_value)
            continue
        cast = ir.node("Cast", [value], {"to": int(wide)}, name=f"{value.name}/widen")
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = f"{value.name}.wide", wide, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)
    for value in graph.inputs:
        if value.dtype is narrow:
            value.dtype = wide
    return bytes(ir.to_proto(model).SerializeToString())


def _float(tensor: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
