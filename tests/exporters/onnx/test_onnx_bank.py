"""export_onnx(adapters="bank"): mixed batches against torch one adapter at a time, for every method with a bank."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_models as models
import onnxruntime as ort
import pytest
import row_models
import torch
from methods import BANKED, LOW_RANK, graft

import fxgraft as fg
from fxgraft.rewriter.errors import ExportError, SessionError

X = torch.linspace(-1, 1, 30).reshape(5, 6)


def tenants(base, method, count=3, targets=("up", "down"), train=("head",)):
    spec = fg.Spec(method, targets=list(targets), train=list(train))
    return {f"t{i}": models.stir(graft(base, spec), seed=i) for i in range(count)}


def wanted(base, own, names, key="scores", **inputs):
    with torch.no_grad():
        outputs = {name: (own[name] if name else base)(**inputs)[key] for name in set(names)}
    return torch.stack([outputs[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("label", BANKED)
def test_mixed_batches_of_every_method(tmp_path, label):
    base = models.classifier()
    own = tenants(base, BANKED[label])
    export = fg.export_onnx(own["t0"], tmp_path / "bank.onnx", (X,), adapters="bank", capacity=2, rank=4)
    assert export.inputs == {"x": ("batch", 6), "adapter_ids": ("batch",)}
    assert [check.case for check in export.parity][:2] == ["example, no adapter", "example, mixed batch"]
    assert export.parity[-1].case == "random 2, mixed batch, 1 more slots, rank + 1"
    fg.export_onnx(base, tmp_path / "base.onnx", (X,))
    session, plain = fg.OrtSession(tmp_path / "bank.onnx", threads=1), fg.OrtSession(tmp_path / "base.onnx", threads=1)
    assert session.slots == {"default": 1}
    session.unload("default")
    for name, model in own.items():
        session.register(name, fg.export_ort_adapter(model, tmp_path / f"{name}.onnx_adapter"))
    # Three tenants, two slots.
    for names in (["t0", None, "t1", "t0", None], ["t2", "t1", "t1", None, "t2"], ["t0", "t2", None, "t0", "t2"]):
        got = session.run({"x": X}, adapter_ids=names)
        for key in ("scores", "hidden"):
            want = wanted(base, own, names, key, x=X)
            assert models.difference(got[key], want) < models.TOLERANCE, (names, key)
        want = plain.run({"x": X})
        for key, rows in want.items():
            without = [i for i, name in enumerate(names) if name is None]
            np.testing.assert_array_equal(got[key][without], rows[without])
            assert np.abs(got[key][0] - rows[0]).max() > 1e-2
    np.testing.assert_array_equal(session.run({"x": X})["scores"], want["scores"])


def test_all_low_rank_methods_share_one_graph(tmp_path):
    base = models.classifier()
    graph = tenants(base, fg.LoRA(rank=1), 1)["t0"]
    fg.export_onnx(graph, tmp_path / "bank.onnx", (X,), adapters="bank", capacity=4, rank=8)
    session = fg.OrtSession(tmp_path / "bank.onnx", threads=1)
    own = {label: tenants(base, method, 1)["t0"] for label, method in LOW_RANK.items()}
    for name, model in own.items():
        session.register(name, fg.export_ort_adapter(model, tmp_path / f"{name}.onnx_adapter"))
    names = ["unilora", "prolora", None]
    got = session.run({"x": X[:3]}, adapter_ids=names)["scores"]
    assert models.difference(got, wanted(base, own, names, x=X[:3])) < models.TOLERANCE
    own["default"] = graph
    names = ["default", "lora", "lora_xs", "unilora", "lora"]
    got = session.run({"x": X}, adapter_ids=names)["scores"]
    assert models.difference(got, wanted(base, own, names, x=X)) < models.TOLERANCE


def test_a_transformer_with_three_axes_and_a_head(tmp_path):
    base = models.bert()
    own = {
        f"t{i}": models.graft(base, ["query", "value", "intermediate.dense"], rank=1 + i, train=("classifier",), seed=i)
        for i in range(3)
    }
    banked = fg.bank(base, own, capacity=5)
    inputs = models.tokens(4, 9)
    export = fg.export_onnx(banked, tmp_path / "bank.onnx", models.tokens(3, 7), adapters="bank")
    assert all(check.relative < models.TOLERANCE for check in export.parity)
    assert fg.export_onnx(base, tmp_path / "base.onnx", models.tokens(3, 7))
    session, plain = fg.OrtSession(tmp_path / "bank.onnx", threads=1), fg.OrtSession(tmp_path / "base.onnx", threads=1)
    assert session.slots == {"t0": 1, "t1": 2, "t2": 3}
    names = ["t2", None, "t0", "t1"]
    got = session.run(inputs, adapter_ids=names)["logits"]
    assert models.difference(got, wanted(base, own, names, "logits", **inputs)) < models.TOLERANCE
    rows = plain.run(inputs)["logits"]
    np.testing.assert_array_equal(got[1], rows[1])
    np.testing.assert_array_equal(session.run(inputs)["logits"], rows)
    # Room for five, of any rank the session is told to take.
    wide = models.graft(base, ["query", "value", "intermediate.dense"], rank=9, train=("classifier",), seed=8)
    file = fg.export_ort_adapter(wide, tmp_path / "wide.onnx_adapter")
    with pytest.raises(fg.AdapterError, match="give OrtSession a larger rank"):
        session.load("wide", file)
    session = fg.OrtSession(tmp_path / "bank.onnx", threads=1, rank=9, capacity=4)
    session.load("wide", file)
    got = session.run(inputs, adapter_ids=["wide", "t0", None, "wide"])["logits"]
    want = wanted(base, {**own, "wide": wide}, ["wide", "t0", None, "wide"], "logits", **inputs)
    assert models.difference(got, want) < models.TOLERANCE


def test_names_follow_the_sites(tmp_path):
    base = models.bert()
    adapted = models.graft(base, ["query"], train=("classifier",))
    export = fg.export_onnx(adapted, tmp_path / "bank.onnx", models.tokens(3, 7), adapters="bank")
    site = "bert.encoder.layer.0.attention.self.query"
    assert export.adapter_inputs == {
        f"{site}.A": ("slots", 32, f"{site}.rank"),
        f"{site}.B": ("slots", f"{site}.rank", 32),
        "classifier.weight.delta": ("slots", 3, 32),
        "classifier.bias.delta": ("slots", 3),
    }
    assert "1 sites (A, B of any rank), 2 trained tensors" in str(export)
    graph = onnx.load(tmp_path / "bank.onnx").graph
    names = {node.name for node in graph.node}
    assert {f"{site}/A", f"{site}/B", f"{site}/A/Gather", f"{site}/B/Gather", "classifier/weight/Gather"} <= names
    assert "classifier.weight" in {tensor.name for tensor in graph.initializer}
    # No reshapes around the products of a batch of sequences, and the ids are read as they are.
    assert not [n for n in graph.node if n.name.startswith(f"{site}/") and n.op_type in ("Reshape", "Cast")]


def test_parts_of_a_fused_weight(tmp_path):
    torch.manual_seed(0)
    base = models.Fused().eval()
    for method in (fg.LoRA(rank=2), fg.HydraLoRA(rank=2, experts=2)):
        own = tenants(base, method, 2, [fg.Target("qkv", parts=3, select=(0, 2))], ())
        banked = fg.bank(base, own)
        export = fg.export_onnx(banked, tmp_path / "m.onnx", (torch.randn(3, 5, 8),), adapters="bank")
        assert {name.rpartition(".")[0] for name in export.adapter_inputs} == {"qkv[0]", "qkv[2]"}
        x = torch.randn(4, 5, 8)
        got = fg.OrtSession(tmp_path / "m.onnx").run({"x": x}, adapter_ids=["t1", "t0", None, "t1"])["output"]
        with torch.no_grad():
            want = torch.stack([own["t1"](x)[0], own["t0"](x)[1], base(x)[2], own["t1"](x)[3]])
        assert models.difference(got, want) < models.TOLERANCE


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [({}, 5), ({"x": {0: "rows"}}, "rows"), ({"x": {0: torch.export.Dim("lines", max=64)}}, "lines")],
    ids=["fixed", "named", "bounded"],
)
def test_a_graph_module_and_shapes_as_the_caller_wants_them(tmp_path, shapes, rows):
    base = torch.fx.symbolic_trace(models.classifier())
    own = tenants(base, fg.LoRA(rank=2), 2)
    export = fg.export_onnx(fg.bank(base, own), tmp_path / "m.onnx", (X,), adapters="bank", dynamic_shapes=shapes)
    assert export.inputs == {"x": (rows, 6), "adapter_ids": (rows,)}
    names = ["t1", None, "t0", "t0", "t1"]
    got = fg.OrtSession(tmp_path / "m.onnx").run({"x": X}, adapter_ids=names)["scores"]
    assert models.difference(got, wanted(base, own, names, x=X)) < models.TOLERANCE
    fg.verify(tmp_path / "m.onnx")


def test_what_cannot_be_banked(tmp_path):
    base, path = models.classifier(), tmp_path / "m.onnx"
    path.write_bytes(b"the previous file")
    adapted = tenants(base, fg.LoRA(rank=2), 1)["t0"]
    for options, error, said in (
        ({"rank": 1}, fg.AdapterError, "rank=1: give a whole number from 2 up"),
        ({"capacity": 0}, fg.AdapterError, "capacity=0: give a whole number from 1 up"),
        ({"name": "default"}, ExportError, "a bank takes every adapter of the model"),
    ):
        with pytest.raises(error, match=said):
            fg.export_onnx(adapted, path, (X,), adapters="bank", **options)
    with pytest.raises(fg.AdapterError, match="no tenant"):
        fg.export_onnx(base, path, (X,), adapters="bank")
    with pytest.raises(fg.MergeError, match="several adapters"):
        fg.export_onnx(fg.bank(adapted), path, (X,), adapters="swappable")

    class Scalar(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.up(x).mean()

    scalar = models.graft(Scalar().eval(), ["up"])
    with pytest.raises(ExportError, match=r"output 'output' \(\) has no row for each of the 5 samples"):
        fg.export_onnx(scalar, path, (X,), adapters="bank")
    assert path.read_bytes() == b"the previous file" and len(list(tmp_path.iterdir())) == 1


def test_experts_of_a_bank_are_of_one_number(tmp_path):
    base = models.classifier()
    fg.export_onnx(
        tenants(base, fg.HydraLoRA(rank=2, experts=3), 1)["t0"], tmp_path / "m.onnx", (X,), adapters="bank", capacity=2
    )
    session = fg.OrtSession(tmp_path / "m.onnx")
    other = tenants(base, fg.HydraLoRA(rank=2, experts=2), 1)["t0"]
    file = fg.export_ort_adapter(other, tmp_path / "other.onnx_adapter")
    with pytest.raises(fg.AdapterError, match=r"the graph takes float32 \((3 x down.rank x 5|6 x 3)\)"):
        session.load("other", file)
    with pytest.raises(SessionError, match="capacity=0"):
        fg.OrtSession(tmp_path / "m.onnx", capacity=0)
    with pytest.raises(fg.AdapterError, match="the graph's own tenants take 1 slots, and rank 2"):
        fg.OrtSession(tmp_path / "m.onnx", rank=1)


@pytest.mark.parametrize("kind", ["SequenceFirst", "SamplesInside", "Queries"])
def test_samples_that_are_not_the_first_dimension(tmp_path, kind):
    """The graph takes each sample's rows from where the bank found them, whatever the sizes."""
    base = getattr(row_models, kind)().eval()
    own = row_models.tenants(base)
    axes = {"x": {0: "batch", 1: "tokens"}}
    example = (torch.randn(3, 4, 8),)
    fg.export_onnx(fg.bank(base, own), tmp_path / "bank.onnx", example, adapters="bank", dynamic_shapes=axes)
    session = fg.OrtSession(tmp_path / "bank.onnx", threads=1)
    for shape in ((3, 4, 8), (5, 6, 8), (2, 2, 8), (1, 5, 8)):
        x, names = torch.randn(shape), row_models.names_of(shape[0])
        (got,) = session.run({"x": x}, adapter_ids=names).values()
        with torch.no_grad():
            want = torch.stack([(own[name] if name else base)(x)[i] for i, name in enumerate(names)])
        assert models.difference(got, want) < models.TOLERANCE
    raw = ort.InferenceSession(tmp_path / "bank.onnx", providers=["CPUExecutionProvider"])
    for wrong in (-1, 3):
        with pytest.raises(Exception, match="out of data bounds"):
            raw.run(None, {"x": np.zeros((2, 4, 8), np.float32), "adapter_ids": np.array([1, wrong])})


def test_samples_that_cannot_be_told_apart(tmp_path):
    base = row_models.Mixed().eval()
    banked = fg.bank(base, row_models.tenants(base))
    with pytest.raises(fg.AdapterError, match="depend on several of the 3 samples"):
        fg.export_onnx(banked, tmp_path / "bank.onnx", (torch.randn(3, 4, 8),), adapters="bank")
    assert not (tmp_path / "bank.onnx").exists()
