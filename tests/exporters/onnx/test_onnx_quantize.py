"""Graphs in few bits: the adapters stay inputs, and what they add is exact; by fxgraft's hand and by the user's."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_models as models
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

import fxgraft as fg


class One(nn.Module):
    """One product, so that a delta can be read off the output."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(32, 480)

    def forward(self, x):
        return self.l(x)


X = torch.linspace(-2, 2, 192).reshape(3, 2, 32)  # onnxruntime's 4-bit quantiser leaves products of matrices alone


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantise")
    adapted = models.graft(One().eval(), ["l"])
    for mode in ("merged", "swappable", "bank"):
        fg.export_onnx(adapted, folder / f"{mode}.onnx", (X,), adapters=mode)
    fg.export_ort_adapter(adapted, folder / "a.onnx_adapter")
    return folder, adapted, fg.merge(adapted)(X) - nn.functional.linear(X, adapted.l.weight, adapted.l.bias)


def delta(path, mode, folder):
    """What the adapter adds, in a graph."""
    session = fg.OrtSession(path)
    if mode == "swappable":
        session.load("a", folder / "a.onnx_adapter")
        return session.run({"x": X}, adapter="a")["output"] - session.run({"x": X})["output"]
    with_it, without = (session.run({"x": X}, adapter_ids=[name] * 3)["output"] for name in ("default", None))
    return with_it - without


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_the_delta_of_a_quantised_graph_is_exact(files, tmp_path, mode, bits):
    folder, adapted, want = files
    made = fg.quantize_onnx(folder / f"{mode}.onnx", tmp_path / "q.onnx", bits)
    assert made.bytes < 0.6 * made.bytes_before
    assert len(made.quantised) == 1 and 1e-4 < made.error < (0.02, 0.2)[bits == 4]
    assert models.difference(delta(tmp_path / "q.onnx", mode, folder), want) < 1e-6
    ops = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert ops.count("MatMulInteger" if bits == 8 else "MatMulNBits") == 1 and ops.count("MatMul") == 2
    seen = fg.verify(tmp_path / "q.onnx", adapted)
    assert seen.manifest["quantised"]["tolerance"] == 4 * made.error and seen.parity
    assert any(f"quantised to {bits} bits" in check for check in seen.checks)


def test_a_whole_merged_model_in_bits(tmp_path):
    adapted = models.graft(models.bert(), ["query"], train=("classifier",))
    fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(3, 6))
    made = fg.quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", 8, external_data=True)
    assert len(made.quantised) >= 7
    session = fg.OrtSession(tmp_path / "q.onnx", verify=True)
    inputs = models.tokens(2, 5)
    assert models.difference(session.run(inputs)["logits"], adapted(**inputs).logits) < 0.1
    left = fg.quantize_onnx(tmp_path / "m.onnx", tmp_path / "r.onnx", exclude=[made.quantised[0]])
    assert set(made.quantised) - set(left.quantised) == {made.quantised[0]}


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_onnxruntimes_quantisers_leave_the_adapters_alone(files, tmp_path, mode):
    folder, _, want = files
    quantize_dynamic(str(folder / f"{mode}.onnx"), str(tmp_path / "8.onnx"), weight_type=QuantType.QInt8)
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / f"{mode}.onnx"), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "4.onnx"), False)
    for bits, kind in ((8, "MatMulInteger"), (4, "MatMulNBits")):
        assert kind in [node.op_type for node in onnx.load(tmp_path / f"{bits}.onnx").graph.node]
        assert models.difference(delta(tmp_path / f"{bits}.onnx", mode, folder), want) < 1e-6


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_a_graph_that_lost_its_adapter_inputs_does_not_open(files, tmp_path, mode):
    folder, *_ = files
    model = onnx.load(folder / f"{mode}.onnx")
    for value in [value for value in model.graph.input if value.name.startswith("l.")]:
        model.graph.input.remove(value)  # what is no input any more is a constant: zeros
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(fg.SessionError, match=r"has no inputs any more for 'l'.*fg\.quantize_onnx keeps them"):
        fg.OrtSession(tmp_path / "m.onnx")


def test_what_is_refused(files, tmp_path):
    folder, *_ = files
    with pytest.raises(fg.ExportError, match="give 8 or 4"):
        fg.quantize_onnx(folder / "merged.onnx", tmp_path / "q.onnx", 16)
    with pytest.raises(fg.ExportError, match="no nodes of"):
        fg.quantize_onnx(folder / "merged.onnx", tmp_path / "q.onnx", exclude=["nothing"])
    with pytest.raises(fg.VerifyError, match="there is no graph"):
        fg.quantize_onnx(tmp_path / "none.onnx", tmp_path / "q.onnx")
    fg.quantize_onnx(folder / "merged.onnx", tmp_path / "q.onnx")
    before = (tmp_path / "q.onnx").read_bytes()
    with pytest.raises(fg.ExportError, match="in 8 bits already"):
        fg.quantize_onnx(tmp_path / "q.onnx", tmp_path / "q.onnx")
    with pytest.raises(fg.ExportError, match="no product"):
        fg.quantize_onnx(folder / "merged.onnx", tmp_path / "q.onnx", exclude=["l/MatMul"])
    assert [path.name for path in tmp_path.iterdir()] == ["q.onnx"] and (tmp_path / "q.onnx").read_bytes() == before


# -- what a session makes of adapters --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weighted")
    base = models.classifier()
    made = {name: models.graft(base, ["up", "down"], rank=rank, seed=rank) for name, rank in (("a", 2), ("b", 3))}
    fg.export_onnx(made["a"], folder / "m.onnx", (torch.randn(4, 6),), adapters="swappable")
    session = fg.OrtSession(folder / "m.onnx")
    for name, model in made.items():
        session.load(name, fg.export_ort_adapter(model, folder / f"{name}.onnx_adapter"))
    return base, made, session, folder


def weighted(base, made, weights, x):
    """The base with W + sum of w * (merged W - W)."""
    state = {key: value.clone() for key, value in base.state_dict().items()}
    for name, weight in weights.items():
        merged = fg.merge(made[name]).state_dict()
        for key in ("up.weight", "down.weight"):
            state[key] += weight * (merged[key] - base.state_dict()[key])
    twin = models.classifier()
    twin.load_state_dict(state)
    return twin(x)["scores"]


def test_adapters_under_weights(two):
    base, made, session, _ = two
    x = torch.randn(3, 6)
    for weights in ({"a": 0.7, "b": -0.2}, {"b": 0.5}, {"a": 1, "b": 1}, {"a": 1.0}, {"a": 0.0}):
        got = session.run({"x": x}, adapter=weights)["scores"]
        assert models.difference(got, weighted(base, made, weights, x)) < models.TOLERANCE, weights
    # Another adapter of the name is another sum.
    session.load("b", session.registered["a"], replace=True)
    try:
        got = session.run({"x": x}, adapter={"a": 0.7, "b": -0.2})["scores"]
        assert models.difference(got, weighted(base, made, {"a": 0.5}, x)) < models.TOLERANCE
    finally:
        session.load("b", session.registered["a"].parent / "b.onnx_adapter", replace=True)
    for wrong in ({"a": float("nan")}, {"a": "1"}, {}, {"a": True}):
        with pytest.raises(fg.AdapterError, match="give a finite number for every name"):
            session.run({"x": x}, adapter=wrong)
    with pytest.raises(fg.AdapterError, match="no adapter 'c' is loaded"):
        session.run({"x": x}, adapter={"c": 0.5})


def test_weights_that_have_no_sum(two, tmp_path, files):
    x = torch.randn(3, 6)
    head = models.graft(models.classifier(), ["up"], train=("head",))
    fg.export_onnx(head, tmp_path / "m.onnx", (x,), adapters="swappable")
    session = fg.OrtSession(tmp_path / "m.onnx")
    session.load("a", fg.export_ort_adapter(head, tmp_path / "a.onnx_adapter"))
    with pytest.raises(fg.AdapterError, match=r"'head\.bias', 'head\.weight' in whole, which has no weighted sum"):
        session.run({"x": x}, adapter={"a": 0.5})
    assert np.array_equal(
        session.run({"x": x}, adapter={"a": 1})["scores"], session.run({"x": x}, adapter="a")["scores"]
    )
    bank = fg.OrtSession(files[0] / "bank.onnx")
    with pytest.raises(fg.SessionError, match="one adapter for every sample, without weights"):
        bank.run({"x": X}, adapter={"default": 0.5})


def test_narrow_adapters_are_widened_and_wide_ones_refused(two, tmp_path):
    _, made, session, folder = two
    narrow = made["a"].__class__  # the same classes: the base goes to float16, and its factors with it
    half = fg.rewrite(models.classifier().half(), fg.Spec(fg.LoRA(rank=2, alpha=4), targets=["up", "down"]))
    assert isinstance(half, narrow)
    with torch.no_grad():
        own = dict(made["a"].named_parameters())
        for key, parameter in half.named_parameters():
            parameter.copy_(own[key])
    path = fg.export_ort_adapter(half, tmp_path / "half.onnx_adapter")
    with pytest.raises(fg.AdapterError, match="trained on other base weights"):
        session.load("half", path)
    loaded = session.load("half", path, check_base=False)
    assert {value.data_type() for value in loaded.values.values()} == {"tensor(float)"}
    x = torch.randn(3, 6)
    got, want = (session.run({"x": x}, adapter=name)["scores"] for name in ("half", "a"))
    assert 0 < np.abs(got - want).max() / np.abs(want).max() < 2e-3
    session.unload("half")
    fg.export_onnx(half, tmp_path / "half.onnx", (x.half(),), adapters="swappable")
    with pytest.raises(fg.AdapterError, match=r"is float32, the graph takes float16; it would be rounded"):
        fg.OrtSession(tmp_path / "half.onnx").load("a", folder / "a.onnx_adapter", check_base=False)


def test_the_fingerprint_sees_weights_of_any_name():
    from fxgraft.exporters.adapterfiles.graph_manifest import fingerprint

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.kernel = nn.Parameter(torch.ones(4, 4))
            self.inner.register_buffer("scale", torch.ones(4))
            self.weight = nn.Parameter(torch.ones(3, 4))

    model = Named()
    before = {site: fingerprint(model, [site]) for site in ("inner.kernel", "inner.kernel[1]", "", "weight")}
    with torch.no_grad():
        model.inner.kernel[0, 0] = 2
    assert fingerprint(model, ["inner.kernel"]) != before["inner.kernel"]
    assert fingerprint(model, ["inner.kernel[1]"]) != before["inner.kernel[1]"]
    assert fingerprint(model, [""]) == before[""]
    with torch.no_grad():
        model.inner.kernel[0, 0], model.inner.scale[0] = 1, 3
        model.weight[0, 0] = 2
    assert fingerprint(model, ["inner.kernel"]) != before["inner.kernel"]  # what it is multiplied with counts too
    assert fingerprint(model, [""]) != before[""] and fingerprint(model, ["weight"]) != before["weight"]
