"""Weights of products in few bits, by the quantisers of onnxruntime, which work on protobuf models."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .save_graph import INLINE_BYTES
from .translate import quiet


def load_weights(path: Path) -> Any:
    """The graph with its weights, transposed ones (heads tied to an embedding) as constants of their own."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    free = {value.name for value in model.graph.input}
    for node in [node for node in model.graph.node if node.op_type == "Transpose"]:
        (name,) = node.input
        perm = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [1, 0])
        if name in weights and name not in free and perm == [1, 0]:
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
            model.graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
            model.graph.node.remove(node)
    # The quantisers turn weights of a Gemm round under their names: shapes noted beside them would be wrong.
    noted = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(noted)
    return model


def _adapter_products(model: Any) -> list[str]:
    """The nodes that read an adapter input, itself or as it is given on."""
    weights = {tensor.name for tensor in model.graph.initializer}
    free = {value.name for value in model.graph.input} & weights
    free |= {node.output[0] for node in model.graph.node if node.op_type == "Identity" and node.input[0] in free}
    return [node.name for node in model.graph.node if free & set(node.input)]


def _products(model: Any) -> list[str]:
    return [node.name.removesuffix("_MatMul") for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]


def in_bits(model: Any, bits: int, block_size: int, exclude: Sequence[str], work: Path) -> tuple[Any, tuple[str, ...]]:
    """The model with its products in 8 or 4 bits, but for those with adapter inputs and nodes of `exclude`; and the
    names of the products. Raises whatever the quantisers stumble over."""
    before = _products(model)
    # A Gemm is turned into a MatMul of that name first.
    left = [name + end for name in (*_adapter_products(model), *exclude) for end in ("", "_MatMul")]
    with quiet(), _silent():
        made = _blocks(model, block_size, left) if bits == 4 else _dynamic(model, left, work)
    return made, tuple(name for name in before if name not in _products(made))


def _blocks(model: Any, block_size: int, left: list[str]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, 4, block_size, nodes_to_exclude=left)
    quantizer.model.replace_gemm_with_matmul()
    quantizer.process()
    return quantizer.model.model


def _dynamic(model: Any, left: list[str], work: Path) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=work) as folder:
        file = Path(folder) / "model.onnx"
        # Unsigned weights: signed ones overflow in the products of CPUs before VNNI.
        quantize_dynamic(
            model,
            str(file),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=left,
            use_external_data_format=model.ByteSize() > INLINE_BYTES,
        )
        return onnx.load(str(file))


@contextmanager
def _silent() -> Iterator[None]:
    """Without the quantisers' remarks, which go to the root logger."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
