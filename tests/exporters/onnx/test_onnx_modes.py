"""Methods that are no plain pair of factors, in graphs that take adapters as inputs: HydraLoRA and GLoRA."""

from __future__ import annotations

import copy

import methods
import numpy as np
import onnx
import onnx_models as models
import pytest
import torch
from methods import FIXED, MERGEABLE

import fxgraft as fg
from fxgraft.exporters.adapterfiles.adapter_format import read_adapter
from fxgraft.rewriter.errors import ExportError

X = torch.linspace(-1, 1, 30).reshape(5, 6)
TARGETS = ["up", "down"]
PATH = fg.GLoRAPath("lora", "vector", "lora", "constant", "vector")


def graft(base, method, targets=TARGETS, train=(), seed=1, **options):
    return models.stir(methods.graft(base, fg.Spec(method, targets=targets, train=list(train), **options)), seed)


def agrees(session, adapted, inputs=None, adapter="a", tolerance=models.TOLERANCE):
    inputs = inputs or {"x": X}
    got = session.run(inputs, adapter=adapter)
    with torch.no_grad():
        want = adapted(**inputs)
    base = session.run(inputs)
    for key in got:
        assert models.difference(got[key], want[key]) < tolerance, key
        assert np.abs(got[key] - base[key]).max() > 1e-2
    return got


# -- HydraLoRA -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hydra(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hydra")
    base = models.bert()
    adapted = graft(base, fg.HydraLoRA(rank=2, experts=3), ["query", "intermediate.dense"])
    export = fg.export_onnx(adapted, folder / "m.onnx", models.tokens(3, 7), adapters="swappable")
    fg.export_onnx(base, folder / "base.onnx", models.tokens(3, 7))
    return folder, base, adapted, export


def test_hydralora_inputs_are_free_of_rank_and_experts(hydra):
    folder, _, _, export = hydra
    site = "bert.encoder.layer.0.attention.self.query"
    assert export.adapter_inputs[f"{site}.A"] == (32, f"{site}.rank")
    assert export.adapter_inputs[f"{site}.router"] == (32, f"{site}.experts")
    assert export.adapter_inputs[f"{site}.B"] == (f"{site}.experts", f"{site}.rank", 32)
    assert "2 sites (A, B, router of any rank)" in str(export)
    assert "random 2, adapter 'default', rank + 1" in [check.case for check in export.parity]
    names = {node.name for node in onnx.load(folder / "m.onnx").graph.node}
    assert {f"{site}/A", f"{site}/router", f"{site}/B", f"{site}/router/Softmax"} <= names


def test_hydralora_without_an_adapter_is_bitwise_the_base(hydra):
    folder, *_ = hydra
    session, plain = fg.OrtSession(folder / "m.onnx", threads=1), fg.OrtSession(folder / "base.onnx", threads=1)
    for batch, length in ((1, 3), (4, 9)):
        inputs = models.tokens(batch, length)
        np.testing.assert_array_equal(session.run(inputs)["logits"], plain.run(inputs)["logits"])


def test_hydralora_adapters_of_any_rank_and_experts(hydra, tmp_path):
    folder, base, adapted, _ = hydra
    targets = ["query", "intermediate.dense"]
    session = fg.OrtSession(folder / "m.onnx", threads=1)
    others = {
        "same": adapted,
        "many": graft(base, fg.HydraLoRA(rank=5, experts=7), targets, seed=2),
        "few": graft(base, fg.HydraLoRA(rank=1, experts=2, alpha=3), targets, seed=3),
        "mixed": graft(
            base,
            fg.HydraLoRA(rank=2, experts=4),
            targets,
            seed=4,
            overrides={"query": fg.HydraLoRA(rank=3, experts=2)},
        ),
    }
    for name, model in others.items():
        for form, expanded in (("own", False), ("plain", True)):
            file = fg.export_ort_adapter(model, tmp_path / f"{name}-{form}.onnx_adapter", expanded=expanded)
            session.load(f"{name}-{form}", file)
        got = agrees(session, model, models.tokens(2, 6, seed=5), f"{name}-own")
        plain = session.run(models.tokens(2, 6, seed=5), adapter=f"{name}-plain")
        np.testing.assert_array_equal(got["logits"], plain["logits"])
    assert set(session.adapters["many-own"].ranks.values()) == {5}


def test_hydralora_files_that_do_not_fit(hydra, tmp_path):
    folder, base, adapted, _ = hydra
    session = fg.OrtSession(folder / "m.onnx", threads=1)
    lora = models.graft(base, ["query", "intermediate.dense"])
    file = fg.export_ort_adapter(lora, tmp_path / "lora.onnx_adapter")
    with pytest.raises(fg.AdapterError, match=r"incomplete: '.*query\.router'"):
        session.load("lora", file)
    with pytest.raises(fg.MergeError, match="router weighs the experts anew"):
        fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(3, 7))
    assert not (tmp_path / "m.onnx").exists()


def test_hydralora_beside_lora_in_one_adapter(tmp_path):
    base = models.classifier()
    adapted = graft(base, fg.LoRA(rank=2), overrides={"down": fg.HydraLoRA(rank=2, experts=2)})
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters="swappable")
    assert sorted(export.adapter_inputs) == ["down.A", "down.B", "down.router", "up.A", "up.B"]
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    agrees(session, adapted)


# -- GLoRA ---------------------------------------------------------------------------------------------------------
def test_glora_merged_after_fixing_its_paths(tmp_path):
    supernet = graft(models.classifier(), fg.GLoRA(rank=2))
    for adapters in ("merged", "swappable"):
        with pytest.raises(fg.MergeError, match="fix_paths"):
            fg.export_onnx(supernet, tmp_path / "m.onnx", (X,), adapters=adapters)
    with pytest.raises(fg.FxgraftError, match="GLoRA"):
        fg.export_onnx(supernet, tmp_path / "m.onnx", (X,), adapters="bank")
    with pytest.raises(fg.MergeError, match="fix_paths"):
        fg.export_ort_adapter(supernet, tmp_path / "a.onnx_adapter")
    assert not list(tmp_path.iterdir())
    fixed = fg.fix_paths(supernet, dict.fromkeys(TARGETS, PATH)).eval()
    export = fg.export_onnx(fixed, tmp_path / "m.onnx", (X,))
    assert all(check.relative < models.TOLERANCE for check in export.parity)
    with torch.no_grad():
        want = fixed(X)["scores"]
    assert models.difference(fg.OrtSession(tmp_path / "m.onnx").run({"x": X})["scores"], want) < models.TOLERANCE


def test_glora_swaps_whole_weights_and_biases(tmp_path):
    base = models.classifier()
    one = graft(base, fg.GLoRA(rank=2, path=PATH), train=("head",))
    export = fg.export_onnx(one, tmp_path / "m.onnx", (X,), adapters="swappable")
    # `down` has no bias in the base, and gets one: zero without an adapter.
    assert export.adapter_inputs == {
        "up.weight": (11, 6), "up.bias": (11,), "down.weight": (5, 11), "down.bias": (5,),
        "head.weight": (3, 5), "head.bias": (3,),
    }  # fmt: skip
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    with torch.no_grad():
        want = base(X)
    for key, got in session.run({"x": X}).items():
        assert models.difference(got, want[key]) < 1e-6
    others = {
        "a": one,
        "weight only": graft(base, fg.GLoRA(path=fg.GLoRAPath("vector", "none", "none", "none", "none")), seed=2,
                             train=("head",)),
        "larger": graft(base, fg.GLoRA(rank=4, path=fg.GLoRAPath("lora", "lora", "vector", "vector", "none")), seed=3,
                        train=("head",)),
    }  # fmt: skip
    for name, model in others.items():
        file = fg.export_ort_adapter(model, tmp_path / f"{name}.onnx_adapter")
        session.load(name, file)
        agrees(session, model, adapter=name)
        assert read_adapter(file).values["up.weight"].shape == (11, 6)
    small = fg.export_ort_adapter(one, tmp_path / "b.onnx_adapter", expanded=False)
    with pytest.raises(fg.CheckpointError, match="GLoRA has no form a graph takes as inputs"):
        session.load("b", small)


def test_glora_has_no_bank_and_says_why(tmp_path):
    one = graft(models.classifier(), fg.GLoRA(rank=2, path=PATH))
    said = r"every slot would hold whole weights, 548 bytes.*adapters='swappable'"
    with pytest.raises(ExportError, match=said):
        fg.export_onnx(one, tmp_path / "m.onnx", (X,), adapters="bank")
    assert not list(tmp_path.iterdir())


def test_glora_beside_lora_and_on_a_conv1d(tmp_path):
    from transformers.pytorch_utils import Conv1D

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = Conv1D(9, 6), torch.nn.Linear(9, 4)
            torch.nn.init.normal_(self.up.weight)

        def forward(self, x):
            return {"y": self.down(torch.relu(self.up(x)))}

    torch.manual_seed(0)
    adapted = graft(Two().eval(), fg.GLoRA(rank=2, path=PATH), overrides={"down": fg.LoRA(rank=3)})
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters="swappable")
    assert sorted(export.adapter_inputs) == ["down.A", "down.B", "up.bias", "up.weight"]
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    agrees(session, adapted)


# -- the method's own tensors in the graph -------------------------------------------------------------------------
@pytest.mark.parametrize("label", FIXED)
def test_a_graph_that_does_the_methods_arithmetic(tmp_path, label):
    base = models.classifier()
    one, other = (graft(base, FIXED[label], train=("head",), seed=seed) for seed in (1, 2))
    export = fg.export_onnx(one, tmp_path / "m.onnx", (X,), adapters="swappable", expanded=False)
    if label == "unilora":
        assert export.adapter_inputs == {"theta": (20,), "head.weight": (3, 5), "head.bias": (3,)}
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    with torch.no_grad():
        want = base(X)
    for key, got in session.run({"x": X}).items():
        assert models.difference(got, want[key]) < 1e-6
    for name, model in (("a", one), ("b", other)):
        session.load(name, fg.export_ort_adapter(model, tmp_path / f"{name}.onnx_adapter", expanded=False))
        agrees(session, model, adapter=name)


@pytest.mark.parametrize("label", FIXED)
def test_merged_and_swappable_graphs_of_every_method(tmp_path, label):
    adapted = graft(models.classifier(), FIXED[label], train=("head",))
    fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters="swappable")
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    agrees(session, adapted)
    if label in MERGEABLE:
        fg.export_onnx(adapted, tmp_path / "merged.onnx", (X,))
        merged = fg.OrtSession(tmp_path / "merged.onnx", threads=1).run({"x": X})
        with torch.no_grad():
            assert all(models.difference(merged[key], want) < models.TOLERANCE for key, want in adapted(X).items())
    else:
        with pytest.raises(fg.FxgraftError, match="cannot be merged"):
            fg.export_onnx(adapted, tmp_path / "merged.onnx", (X,))


def test_own_tensors_of_another_config_are_refused(tmp_path):
    base = models.classifier()
    uni = graft(base, FIXED["unilora"])
    fg.export_onnx(uni, tmp_path / "m.onnx", (X,), adapters="swappable", expanded=False)
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    path = tmp_path / "a.onnx_adapter"
    for model, options, said in (
        (uni, {"expanded": True}, "holds expanded tensors, and the graph takes the method's own"),
        (graft(base, fg.UniLoRA(rank=4, vector_length=20, seed=1)), {"expanded": False}, "another config.*'seed': 1"),
        (graft(base, FIXED["unilora"], ["up"]), {"expanded": False}, "it is of other sites"),
    ):
        fg.export_ort_adapter(model, path, **options)
        with pytest.raises(fg.AdapterError, match=said):
            session.load("a", path)
    with pytest.raises(ExportError, match="expanded=False is for adapters='swappable'"):
        fg.export_onnx(uni, tmp_path / "m.onnx", (X,), expanded=False)


# -- half precision ------------------------------------------------------------------------------------------------
HALVES = pytest.mark.parametrize(
    ("label", "options"),
    [
        ("lora", {"adapters": "bank", "capacity": 2}),
        ("hydralora", {"adapters": "bank", "capacity": 2}),
        ("hydralora", {"adapters": "swappable"}),
        ("glora", {"adapters": "swappable"}),
        ("unilora", {"adapters": "swappable", "expanded": False}),
        ("glora", {"adapters": "swappable", "expanded": False}),
    ],
)


@HALVES
def test_float16(tmp_path, label, options):
    base = models.classifier().half()
    adapted = graft(base, FIXED[label], train=("head",))
    assert adapted.get_parameter("head.weight").dtype is torch.float16
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", (X.half(),), **options)
    assert export.tolerance == 1e-2 and all(check.relative < 5e-3 for check in export.parity)
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    file = fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter", expanded=options.get("expanded"))
    session.load("a", file)
    got = session.run({"x": X.half()}, adapter="a")
    with torch.no_grad():
        want = adapted(X.half())
        exact = copy.deepcopy(adapted).float()(X)
    for key, value in got.items():
        assert models.difference(value, want[key]) < 5e-3
        assert models.difference(value, exact[key]) < 5e-3
    fg.verify(tmp_path / "m.onnx", adapted)


@HALVES
def test_bfloat16_is_compared_in_float32(tmp_path, label, options):
    """onnxruntime's CPU has no bfloat16 products: the graph computes in float32 over its bfloat16 weights."""
    adapted = graft(models.classifier().bfloat16(), FIXED[label], train=("head",))
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", (X.bfloat16(),), **options)
    # Factors and whole weights are rounded to the base's bfloat16 (8 bits); own tensors stay as they are.
    limit = 1e-5 if options.get("expanded") is False else 3e-2
    assert export.tolerance == 5e-2 and all(check.relative < limit for check in export.parity)
    assert any("compared in float32" in note for note in export.notes)
    graph = onnx.load(tmp_path / "m.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["up.weight" if "up.weight" in types else "up.weight.T"] == onnx.TensorProto.BFLOAT16
    fg.verify(tmp_path / "m.onnx", adapted)
