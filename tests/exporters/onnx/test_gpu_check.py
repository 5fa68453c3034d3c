"""check_gpu: our exports stay on the GPU, and what would not is named."""

from __future__ import annotations

import onnx
import onnx_models as models
import pytest
import torch
from onnx import TensorProto, helper

import fxgraft as fg
from fxgraft.exporters.ort.session import OrtSession
from fxgraft.rewriter.errors import SessionError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL, "bf16": TensorProto.BFLOAT16}


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def graph(tmp_path, nodes, inputs, outputs, opset=18, functions=(), initializers=()):
    """A graph of `nodes`; inputs and outputs are {name: (kind, shape)}."""

    def infos(values):
        return [helper.make_tensor_value_info(name, KINDS[kind], shape) for name, (kind, shape) in values.items()]

    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), initializer=list(initializers))
    onnx.save(helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=9), tmp_path / "g.onnx")
    return fg.check_gpu(tmp_path / "g.onnx")


# -- our exports ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_our_exports_stay_on_the_gpu(tmp_path, kind, dtype):
    base = (models.bert() if kind == "bert" else vit()).to(DTYPES[dtype])
    targets = ["query", "value"] if kind == "bert" else "all-linear"
    adapted = models.graft(base, targets, train=("classifier",)).to(DTYPES[dtype])
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=DTYPES[dtype])}
    example = models.tokens(2, 7) if kind == "bert" else pixels
    for mode in ("merged", "swappable") if dtype == "float32" else ("swappable",):
        export = fg.export_onnx(adapted, tmp_path / "m.onnx", example, adapters=mode)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]
        report = fg.check_gpu(export.path)
        assert report.ok and not report.fallbacks and report.nodes > 40, str(report)
        # Only whole numbers stay on the CPU.
        assert {node.dtypes.get("T", "int64") for node in report.shape_arithmetic} == {"int64"}
        assert any("bfloat16" in note for note in export.notes) == (dtype == "bfloat16")


def test_a_bfloat16_export_is_compared_in_float32(tmp_path):
    adapted = models.graft(models.classifier().bfloat16(), ["up"], train=("head",)).bfloat16()
    x = torch.randn(4, 6).bfloat16()
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", (x,), adapters="swappable", external_data=True)
    assert export.tolerance == 5e-2 and all(0 < check.relative < 1e-2 for check in export.parity)
    assert all(check.relative < 1e-5 for check in export.parity if "no adapter" in check.case)
    assert fg.verify(tmp_path / "m.onnx", adapted).parity
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert set(stored.values()) == {TensorProto.BFLOAT16} and len(stored) == 7
    with pytest.raises(SessionError, match=r"cannot load.*few bfloat16 kernels: run it on CUDA, or export"):
        OrtSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with pytest.raises(fg.FxgraftError, match="differs from torch"):
        fg.export_onnx(adapted, tmp_path / "n.onnx", (x,), tolerance=1e-6)


# -- what is reported ----------------------------------------------------------------------------------------------
def test_an_operator_without_a_kernel(tmp_path):
    node = helper.make_node("StringNormalizer", ["s"], ["t"], name="lower")
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("s", TensorProto.STRING, [3])],
        [helper.make_tensor_value_info("t", TensorProto.STRING, [3])],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    report = fg.check_gpu(tmp_path / "g.onnx")
    (found,) = report.fallbacks
    assert (found.name, found.operator, found.version) == ("lower", "StringNormalizer", 10)
    assert found.reason == "the operator has no kernel" and not report.ok
    assert "1 fall back" in str(report) and "StringNormalizer version 10 'lower'" in str(report)
    assert "ONNX Runtime 1.24" in report.release and report.release in str(report)


def test_a_dtype_without_a_kernel(tmp_path):
    nodes = [
        helper.make_node("Reciprocal", ["x"], ["y"], name="inverse"),
        helper.make_node("Mul", ["y", "x"], ["z"], name="product"),
    ]
    report = graph(tmp_path, nodes, {"x": ("bf16", ["n", 2])}, {"z": ("bf16", ["n", 2])})
    (found,) = report.fallbacks
    assert found.name == "inverse" and found.dtypes == {"T": "bfloat16"}
    assert "no kernel for T bfloat16 (there is one for double, float, float16)" in found.reason
    assert graph(tmp_path, nodes, {"x": ("float", ["n", 2])}, {"z": ("float", ["n", 2])}).ok


def test_a_version_without_a_kernel(tmp_path):
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up")]
    ends = {"x": ("float", [1, 2, 4, 4]), "w": ("float", [2, 3, 2, 2])}
    assert graph(tmp_path, nodes, ends, {"y": ("float", [1, 3, 5, 5])}).ok
    # The kernel that begins at version 11 has no end, and is for that version alone.
    (found,) = graph(tmp_path, nodes, ends, {"y": ("float", [1, 3, 5, 5])}, opset=22).fallbacks
    assert found.version == 22 and found.reason == "kernels exist for versions 1-10, 11"


def test_nodes_in_branches_and_functions(tmp_path):
    inner = helper.make_node("Det", ["x"], ["d"], name="inner")
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("d", TensorProto.FLOAT, [2])])
    choice = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    body = helper.make_function(
        "my",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Det", ["a"], ["b"], name="deep")],
        [helper.make_opsetid("", 18)],
    )
    call = helper.make_node("Twice", ["x"], ["z"], domain="my", name="call")
    report = graph(
        tmp_path,
        [choice, call],
        {"c": ("bool", []), "x": ("float", [2, 3, 3])},
        {"y": ("float", [2]), "z": ("float", [2])},
        functions=[body],
    )
    assert [(node.operator, node.where) for node in report.fallbacks] == [
        ("Det", "choice/else_branch"),
        ("Det", "choice/then_branch"),
        ("Det", ""),
    ]
    assert "deep" in report.fallbacks[2].name and "in choice/then_branch" in str(report)


def test_shape_arithmetic_is_no_fallback(tmp_path):
    """Sizes are computed on the CPU, also by operators that have no kernel for them; data made from sizes is not."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("BitwiseAnd", ["shape", "mask"], ["even"], name="even"),  # no CUDA kernel
        helper.make_node("Reshape", ["x", "even"], ["y"], name="view"),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], name="rows"),
        helper.make_node("Range", ["zero", "rows", "one"], ["places"], name="places"),
        helper.make_node("BitwiseAnd", ["places", "one"], ["odd"], name="odd"),
    ]
    numbers = [
        helper.make_tensor("mask", TensorProto.INT64, [2], [-1, -1]),
        helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
    ]
    ends = {"x": ("float", ["n", 4])}, {"y": ("float", None), "odd": ("int64", ["n"])}
    report = graph(tmp_path, nodes, *ends, initializers=numbers)
    assert [node.name for node in report.shape_arithmetic] == ["even", "rows"]
    assert [node.name for node in report.fallbacks] == ["odd"]
    assert "2 nodes of shape arithmetic" in str(report)


def test_a_default_that_can_be_given_is_no_constant(tmp_path):
    numbers = [helper.make_tensor("m", TensorProto.FLOAT, [1, 2, 2], [1.0, 0.0, 0.0, 1.0])]
    nodes = [helper.make_node("Det", ["m"], ["d"], name="det"), helper.make_node("Mul", ["x", "d"], ["y"], name="mul")]
    ends = {"x": ("float", ["n"])}, {"y": ("float", ["n"])}
    assert graph(tmp_path, nodes, *ends, initializers=numbers).ok  # computed once, when the graph is loaded
    swapped = {"x": ("float", ["n"]), "m": ("float", [1, 2, 2])}
    assert [n.name for n in graph(tmp_path, nodes, swapped, ends[1], initializers=numbers).fallbacks] == ["det"]


def test_dtypes_that_are_not_in_the_file(tmp_path):
    nodes = [
        helper.make_node("Gelu", ["x"], ["t"], domain="com.microsoft", name="theirs"),
        helper.make_node("Softmax", ["t"], ["u"], name="after"),
        helper.make_node("Relu", ["u"], ["y"], name="last"),
    ]
    report = graph(tmp_path, nodes, {"x": ("float", ["n", 2])}, {"y": ("float", None)})
    # onnx knows nothing of the operator, so the type of what it makes is known where the graph states it
    assert not report.fallbacks and [node.name for node in report.unchecked] == ["after"]
    assert not report.ok and "1 are of unknown dtypes" in str(report)


# -- errors --------------------------------------------------------------------------------------------------------
def test_files_that_are_no_graph(tmp_path):
    with pytest.raises(SessionError, match=r"there is no graph '.*nowhere\.onnx'"):
        fg.check_gpu(tmp_path / "nowhere.onnx")
    with pytest.raises(SessionError, match="there is no graph"):
        fg.check_gpu(tmp_path)
    for name, content in {"text.onnx": b"not a graph at all", "empty.onnx": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SessionError, match=rf"'.*{name}' is no ONNX graph"):
            fg.check_gpu(tmp_path / name)
