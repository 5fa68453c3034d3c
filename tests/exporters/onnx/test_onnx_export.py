"""export_onnx: what the graph computes, how it is named, and that the model is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.exporters.onnx.export import export_onnx
from fxgraft.exporters.ort.session import OrtSession, export_ort_adapter

QV = ["query", "value"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """A BERT with q, v and head adapted, exported as base, merged and swappable."""
    folder = tmp_path_factory.mktemp("bert")
    base = models.bert()
    adapted = models.graft(base, QV, rank=4, train=("classifier",))
    example = models.tokens(2, 7)
    made = {
        "base": export_onnx(base, folder / "base.onnx", example),
        "merged": export_onnx(adapted, folder / "merged.onnx", example),
        "swappable": export_onnx(adapted, folder / "swappable.onnx", example, adapters="swappable"),
    }
    return folder, base, adapted, made


def test_merged_bert_agrees_with_torch_at_other_sizes(berts):
    folder, base, adapted, made = berts
    export = made["merged"]
    assert export.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert export.outputs == {"logits": ("batch", 3)}
    assert export.dynamic_axes == {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    assert export.adapter_inputs == {}
    session = OrtSession(folder / "merged.onnx", threads=1)
    for batch, length in ((1, 2), (3, 7), (2, 32)):
        inputs = models.tokens(batch, length, seed=length)
        with torch.no_grad():
            want, without = adapted(**inputs).logits, base(**inputs).logits
        got = session.run(inputs)["logits"]
        assert models.difference(got, want) < models.TOLERANCE
        assert models.difference(got, without) > 0.05


def test_the_report_holds_every_parity_figure(berts):
    *_, made = berts
    assert [check.case for check in made["merged"].parity] == [
        "example, merged",
        "random 1, merged",
        "random 2, merged",
    ]
    cases = [check.case for check in made["swappable"].parity]
    assert cases[:3] == ["example, no adapter", "example, adapter 'default'", "example, random adapter"]
    assert len(cases) == 8
    for export in made.values():
        assert all(check.relative <= check.allowed for check in export.parity)
        assert all(0 < check.relative < models.TOLERANCE for check in export.parity)
        sizes = {check.sizes for check in export.parity}
        assert len(sizes) == 3 and "input_ids 1x6, attention_mask 1x6" in sizes
        assert export.bytes == export.path.stat().st_size
    text = str(made["swappable"])
    assert "batch x sequence" in text and "2 sites" in text and "2 trained tensors" in text and "no adapter" in text


def test_swappable_without_an_adapter_is_the_base(berts):
    # Not bitwise here: onnxruntime packs a constant head and not one that can be swapped, and sums in another order.
    folder, *_ = berts
    base, swappable = OrtSession(folder / "base.onnx", threads=1), OrtSession(folder / "swappable.onnx", threads=1)
    for batch, length in ((1, 3), (4, 9)):
        inputs = models.tokens(batch, length)
        want = torch.from_numpy(base.run(inputs)["logits"])
        assert models.difference(swappable.run(inputs)["logits"], want) < 2e-6


def test_without_a_trained_head_no_adapter_is_bitwise_the_base(tmp_path):
    base = models.llama()
    adapted = models.graft(base, ["q_proj", "v_proj", "down_proj"], rank=3)
    export_onnx(base, tmp_path / "base.onnx", models.tokens(2, 6))
    export = export_onnx(adapted, tmp_path / "m.onnx", models.tokens(2, 6), adapters="swappable")
    assert export.outputs == {"logits": ("batch", "sequence", 100)}
    assert all(check.relative < models.TOLERANCE for check in export.parity)
    export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    plain, session = OrtSession(tmp_path / "base.onnx", threads=1), OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", tmp_path / "a.onnx_adapter")
    for batch, length in ((1, 11), (3, 4)):
        inputs = models.tokens(batch, length, seed=3)
        np.testing.assert_array_equal(session.run(inputs)["logits"], plain.run(inputs)["logits"])
        with torch.no_grad():
            want = adapted(**inputs, use_cache=False).logits
        assert models.difference(session.run(inputs, adapter="a")["logits"], want) < models.TOLERANCE


def test_adapters_of_any_rank_and_method_load_into_one_graph(berts):
    folder, base, adapted, _ = berts
    others = {
        "a": adapted,
        "b": models.graft(base, QV, rank=1, train=("classifier",), seed=5),
        "c": models.graft(base, QV, rank=9, train=("classifier",), seed=6),
        "uni": models.stir(fg.rewrite(base, fg.Spec(fg.UniLoRA(4, 96), targets=QV, train=["classifier"])), seed=7),
    }
    session = OrtSession(folder / "swappable.onnx", threads=1)
    for name, model in others.items():
        export_ort_adapter(model, folder / f"{name}.onnx_adapter")
        session.load(name, folder / f"{name}.onnx_adapter")
    assert set(session.adapters["c"].ranks.values()) == {9}
    inputs = models.tokens(3, 8, seed=2)
    with torch.no_grad():
        want = {name: model(**inputs).logits for name, model in others.items()}
        plain = base(**inputs).logits
    for name in ("a", "b", "uni", "a", "c", "b"):
        got = session.run(inputs, adapter=name)["logits"]
        assert models.difference(got, want[name]) < models.TOLERANCE, name
        assert models.difference(got, plain) > 0.05, name
    assert models.difference(session.run(inputs)["logits"], plain) < models.TOLERANCE


def test_names_follow_the_modules_and_nothing_tells_the_machine(berts):
    folder, _, _, made = berts
    site = "bert.encoder.layer.0.attention.self.query"
    shapes = made["swappable"].adapter_inputs
    assert shapes[f"{site}.A"] == (32, f"{site}.rank") and shapes[f"{site}.B"] == (f"{site}.rank", 32)
    assert shapes["classifier.weight"] == (3, 32) and shapes["classifier.bias"] == (3,)
    assert len(shapes) == 6
    graph = onnx.load(folder / "swappable.onnx").graph
    names = [node.name for node in graph.node]
    assert {f"{site}/A", f"{site}/B"} <= set(names) and len(set(names)) == len(names)
    assert f"{site}.weight.T" in {tensor.name for tensor in graph.initializer}
    for kind in made:
        content = (folder / f"{kind}.onnx").read_bytes()
        assert b"site-packages" not in content and b".py" not in content


def test_the_model_is_left_as_it_was(tmp_path):
    base = models.classifier()
    adapted = models.graft(base, ["up", "down"], train=("head",))
    adapted.train()
    adapted.down.eval()
    modes = {name: module.training for name, module in adapted.named_modules()}
    state = {key: value.clone() for key, value in adapted.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    for mode in ("merged", "swappable"):
        export_onnx(adapted, tmp_path / f"{mode}.onnx", (torch.randn(2, 6),), adapters=mode)
    assert {name: module.training for name, module in adapted.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == grads
    assert all(torch.equal(value, state[key]) for key, value in adapted.state_dict().items())
    assert fg.active(adapted) == ["default"]


def test_a_head_with_zero_bias_can_still_be_swapped(tmp_path):
    # The ONNX optimizer drops a zero bias, and with it the input an adapter would set.
    base = models.classifier()
    adapted = models.graft(base, ["up"], train=("head",))
    assert not base.head.bias.any() and adapted.state_dict()["head.bias"].equal(base.head.bias)
    export = export_onnx(adapted, tmp_path / "m.onnx", {"x": torch.randn(3, 6)}, adapters="swappable")
    assert {"head.bias", "head.weight"} <= set(export.adapter_inputs)
    export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    session = OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", tmp_path / "a.onnx_adapter")
    x = torch.randn(5, 6)
    with torch.no_grad():
        want = adapted(x)
    got = session.run({"x": x}, adapter="a")
    assert list(got) == ["scores", "hidden"]
    assert models.difference(got["scores"], want["scores"]) < models.TOLERANCE
    assert models.difference(got["hidden"], want["hidden"]) < models.TOLERANCE


def test_a_slice_of_a_fused_weight_is_a_site_of_its_own(tmp_path):
    torch.manual_seed(0)
    adapted = models.graft(models.Fused().eval(), [fg.Target("qkv", parts=3, select=(0, 2))])
    export = export_onnx(adapted, tmp_path / "m.onnx", (torch.randn(2, 5, 8),), adapters="swappable")
    assert len(export.adapter_inputs) == 4
    assert next(shape for name, shape in export.adapter_inputs.items() if name.endswith(".B"))[1] == 8
    assert export.inputs == {"x": ("batch", 5, 8)} and export.outputs == {"output": ("batch", 5, 4)}


def test_one_of_several_adapters_by_name(tmp_path):
    adapted = models.graft(models.classifier(), ["up"], name="a")
    adapted = models.graft(adapted, ["up", "down"], rank=2, seed=9, name="b")
    x = torch.randn(4, 6)
    for name in ("a", "b"):
        fg.set_active(adapted, [name])
        with torch.no_grad():
            want = adapted(x)["scores"]
        fg.set_active(adapted, ["b" if name == "a" else "a"])
        export_onnx(adapted, tmp_path / f"{name}.onnx", (x,), name=name)
        got = OrtSession(tmp_path / f"{name}.onnx").run({"x": x})["scores"]
        assert models.difference(got, want) < models.TOLERANCE
    fg.set_active(adapted, ["a", "b"])
    with torch.no_grad():
        want = adapted(x)["scores"]
    export_onnx(adapted, tmp_path / "both.onnx", (x,))
    assert models.difference(OrtSession(tmp_path / "both.onnx").run({"x": x})["scores"], want) < models.TOLERANCE
    with pytest.raises(fg.FxgraftError, match="2 are active: give name="):
        export_onnx(adapted, tmp_path / "s.onnx", (x,), adapters="swappable")


def test_shapes_as_the_caller_wants_them(tmp_path):
    adapted = models.graft(models.classifier(), ["up"])
    x = torch.randn(4, 6)
    fixed = export_onnx(adapted, tmp_path / "fixed.onnx", (x,), dynamic_shapes={}, opset=18)
    assert fixed.inputs == {"x": (4, 6)} and fixed.dynamic_axes == {} and fixed.opset == 18
    named = export_onnx(adapted, tmp_path / "named.onnx", (x,), dynamic_shapes={"x": {0: "rows"}})
    assert named.inputs == {"x": ("rows", 6)} and named.outputs["scores"] == ("rows", 3)
    bounded = export_onnx(
        adapted, tmp_path / "dim.onnx", (x,), dynamic_shapes=({0: torch.export.Dim("lines", min=2, max=64)},)
    )
    assert bounded.inputs == {"x": ("lines", 6)}
    # A single sample is fine where nothing is dynamic.
    one = export_onnx(adapted, tmp_path / "one.onnx", (x[:1],), dynamic_shapes={})
    assert one.inputs == {"x": (1, 6)}


def test_a_sequence_the_model_fixes_is_noted(tmp_path):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 5)
            self.places = torch.nn.Parameter(torch.randn(7, 6))

        def forward(self, input_ids):
            return self.up(self.embed(input_ids) + self.places)

    adapted = models.graft(Fixed().eval(), ["up"])
    export = export_onnx(adapted, tmp_path / "m.onnx", (torch.randint(0, 9, (3, 7)),))
    assert export.inputs == {"input_ids": ("batch", 7)}
    (note,) = export.notes
    assert note.startswith("the model fixes axis 1 ('sequence') of input 'input_ids' to 7: it computes with the number")
    assert {check.sizes for check in export.parity} == {"input_ids 3x7", "input_ids 1x7", "input_ids 4x7"}
    fg.verify(tmp_path / "m.onnx", adapted)


def test_constants_are_baked_in(tmp_path):
    adapted = models.graft(models.classifier(), ["up"])
    x = torch.randn(4, 6)
    export = export_onnx(adapted, tmp_path / "m.onnx", {"x": x, "scale": 3.0})
    assert list(export.inputs) == ["x"] and export.dynamic_axes == {"x": {0: "batch"}}
    with torch.no_grad():
        want = adapted(x, scale=3.0)["scores"]
    assert models.difference(OrtSession(tmp_path / "m.onnx").run({"x": x})["scores"], want) < models.TOLERANCE


def test_a_tensor_returned_twice_has_two_names(tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 5)

        def forward(self, x):
            y = self.up(x)
            return y, y, x

    adapted = models.graft(Twice().eval(), ["up"])
    x = torch.randn(4, 6)
    export = export_onnx(adapted, tmp_path / "m.onnx", (x,))
    assert list(export.outputs) == ["output_0", "output_1", "output_2"]
    got = OrtSession(tmp_path / "m.onnx").run({"x": x})
    np.testing.assert_array_equal(got["output_0"], got["output_1"])
    np.testing.assert_array_equal(got["output_2"], x.numpy())


def test_weights_in_a_file_of_their_own(tmp_path):
    adapted = models.graft(models.classifier(), ["up"])
    x = torch.randn(4, 6)
    first = export_onnx(adapted, tmp_path / "m.onnx", (x,), external_data=True)
    data = [name for name in first.files if name.endswith(".weights")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["m.onnx", *data]) and len(data) == 1
    again = export_onnx(adapted, tmp_path / "m.onnx", (x,), external_data=True)
    assert again.files == first.files  # named by content
    changed = export_onnx(models.stir(adapted, 8), tmp_path / "m.onnx", (x,), external_data=True)
    assert set(changed.files) != set(first.files)
    with torch.no_grad():
        want = adapted(x)["scores"]
    assert models.difference(OrtSession(tmp_path / "m.onnx").run({"x": x})["scores"], want) < models.TOLERANCE


def test_half_precision(tmp_path):
    adapted = models.graft(models.classifier().half(), ["up"])
    export = export_onnx(adapted.half(), tmp_path / "m.onnx", (torch.randn(4, 6).half(),), adapters="swappable")
    assert export.tolerance == 1e-2
    session = OrtSession(tmp_path / "m.onnx")
    assert {info.dtype for info in session.adapter_inputs.values()} == {"float16"}
    export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    session.load("a", tmp_path / "a.onnx_adapter")
    x = torch.randn(3, 6).half()
    with torch.no_grad():
        want = adapted(x)["scores"]
    assert models.difference(session.run({"x": x}, adapter="a")["scores"], want.float()) < 1e-2
