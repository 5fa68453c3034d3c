"""Structured adapter files: the method's own tensors on disk, the same numbers as expanded ones once loaded."""

from __future__ import annotations

import json

import methods
import numpy as np
import onnx_models as models
import onnxruntime
import pytest
import torch
from methods import LOW_RANK

import fxgraft as fg
from fxgraft.exporters.adapterfiles.adapter_format import read_adapter
from fxgraft.exporters.adapterfiles.structured import Expander
from fxgraft.exporters.onnx.export import export_onnx
from fxgraft.exporters.ort.session import OrtSession, export_ort_adapter
from fxgraft.passes.methods.unilora.unilora import UniLoRA
from fxgraft.passes.models.factors import factors
from fxgraft.rewriter.errors import ExportError

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
TARGETS = ["up", "down"]
UNI = fg.UniLoRA(rank=4, vector_length=40, init_bound=0.5)
PRO = fg.PRoLoRA(rank=5, unshared=1, a_chunks=2, b_chunks=2)
METHODS = {
    **LOW_RANK,
    "uniform": fg.UniLoRA(rank=2, vector_length=30, sampler="uniform", seed=5, init_bound=0.5),
    "prolora shared": fg.PRoLoRA(rank=4, unshared=0, a_chunks=4, b_chunks=3),
}


def graft(base, method, train=("head",), seed=1, **options):
    return models.stir(methods.graft(base, fg.Spec(method, targets=TARGETS, train=train, **options)), seed)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """One graph that no method but LoRA has seen."""
    path = tmp_path_factory.mktemp("structured") / "m.onnx"
    base = models.classifier()
    export_onnx(graft(base, fg.LoRA(rank=2)), path, (torch.from_numpy(X),), adapters="swappable")
    return path, base


@pytest.mark.parametrize("label", METHODS)
def test_every_low_rank_method_loads_into_one_graph(graph, tmp_path, label):
    path, base = graph
    adapted = graft(base, METHODS[label])
    session = OrtSession(path, threads=1)
    for form, expanded in (("own", False), ("plain", True), ("either", None)):
        session.load(form, export_ort_adapter(adapted, tmp_path / f"{form}.onnx_adapter", expanded=expanded))
    runs = {form: session.run({"x": X}, adapter=form) for form in ("own", "plain", "either")}
    with torch.no_grad():
        want = adapted(torch.from_numpy(X))
    for key, got in runs["own"].items():
        assert models.difference(got, want[key]) < models.TOLERANCE
        assert np.array_equal(got, runs["plain"][key]) and np.array_equal(got, runs["either"][key])
    assert np.abs(runs["own"]["hidden"] - session.run({"x": X})["hidden"]).max() > 1e-2
    own, plain = (read_adapter(tmp_path / f"{form}.onnx_adapter") for form in ("own", "plain"))
    assert own.model_version == plain.model_version and (own.adapter_version, plain.adapter_version) == (2, 1)
    # "either" is the one with fewer bytes of tensors.
    sizes = [sum(tensor.nbytes for tensor in file.values.values()) for file in (own, plain)]
    assert (read_adapter(tmp_path / "either.onnx_adapter").described is not None) == (sizes[0] < sizes[1])


def test_what_a_file_holds(graph, tmp_path):
    _, base = graph
    own = read_adapter(export_ort_adapter(graft(base, UNI), tmp_path / "uni.onnx_adapter"))
    assert sorted(own.values) == ["head.bias", "head.weight", "theta"] and own.values["theta"].shape == (40,)
    (group,) = own.described["groups"]
    assert group["method"] == UNI.to_dict()
    assert group["sites"] == {"up": [11, 6, "float32"], "down": [5, 11, "float32"]}
    pro = read_adapter(export_ort_adapter(graft(base, PRO), tmp_path / "pro.onnx_adapter"))
    assert pro.described is not None and pro.values["up.A_shared"].shape == (4, 3)
    xs = read_adapter(export_ort_adapter(graft(base, METHODS["lora_xs"]), tmp_path / "xs.onnx_adapter"))
    assert xs.described is None  # R beside the frozen A and B is more than A and B R


def test_onnxruntime_itself_takes_expanded_files(graph, tmp_path):
    path, base = graph
    adapted = graft(base, UNI)
    file = export_ort_adapter(adapted, tmp_path / "uni.onnx_adapter", expanded=True)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level, quiet.intra_op_num_threads = 3, 1
    got = onnxruntime.InferenceSession(str(path), quiet).run(["scores"], {"x": X}, options)[0]
    session = OrtSession(path, threads=1)
    session.load("uni", export_ort_adapter(adapted, tmp_path / "small.onnx_adapter"))
    assert np.array_equal(got, session.run({"x": X}, adapter="uni")["scores"])


@pytest.mark.parametrize(
    "overrides",
    [{"down": fg.UniLoRA(rank=3, vector_length=20, seed=7, init_bound=0.5)}, {"up": fg.PRoLoRA(rank=4, unshared=1)}],
)
def test_several_configs_in_one_adapter(graph, tmp_path, overrides):
    path, base = graph
    if "up" in overrides:
        overrides = {"up": fg.PRoLoRA(rank=4, unshared=1, a_chunks=2, b_chunks=2)}
    adapted = graft(base, UNI if "down" in overrides else fg.UniLoRA(rank=4, vector_length=30), overrides=overrides)
    session = OrtSession(path, threads=1)
    file = export_ort_adapter(adapted, tmp_path / "two.onnx_adapter", expanded=False)
    assert len(read_adapter(file).described["groups"]) == 2
    session.load("two", file)
    with torch.no_grad():
        want = adapted(torch.from_numpy(X))["scores"]
    assert models.difference(session.run({"x": X}, adapter="two")["scores"], want) < models.TOLERANCE


def test_parts_of_a_fused_weight(tmp_path):
    base = models.classifier()
    targets = [fg.Target("up", parts=11, select=(3, 7)), "down"]
    adapted = models.stir(fg.rewrite(base, fg.Spec(fg.UniLoRA(rank=1, vector_length=9), targets=targets)))
    export_onnx(adapted, tmp_path / "m.onnx", (torch.from_numpy(X),), adapters="swappable")
    session = OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", export_ort_adapter(adapted, tmp_path / "a.onnx_adapter", expanded=False))
    assert set(session.adapters["a"].ranks) == {"up[3]", "up[7]", "down"}
    with torch.no_grad():
        want = adapted(torch.from_numpy(X))["scores"]
    assert models.difference(session.run({"x": X}, adapter="a")["scores"], want) < models.TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_models(tmp_path, dtype):
    """The vector stays float32 in the file, the factors come out in the base's dtype."""
    adapted = graft(models.classifier().to(dtype), UNI)
    for expanded in (False, True):
        file = read_adapter(export_ort_adapter(adapted, tmp_path / "a.onnx_adapter", expanded=expanded))
        values = Expander()(file.described, file.values, "it") if file.described else file.values
        for site, (a, b) in factors(adapted).items():
            assert values[f"{site}.A"].dtype is dtype
            assert torch.equal(values[f"{site}.A"], a) and torch.equal(values[f"{site}.B"], b)
        assert torch.equal(values["head.weight"], adapted.head.fxgraft.default.weight)


def test_values_that_the_config_does_not_give(graph, tmp_path):
    path, base = graph
    adapted = graft(base, UNI)
    indices = adapted.up.fxgraft.default.index_a
    indices.copy_(indices.flip(0))
    with pytest.raises(ExportError, match=r"its config does not give the values it has at .*expanded=True"):
        export_ort_adapter(adapted, tmp_path / "a.onnx_adapter", expanded=False)
    assert not (tmp_path / "a.onnx_adapter").exists()
    session = OrtSession(path, threads=1)
    session.load("a", export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    with torch.no_grad():
        want = adapted(torch.from_numpy(X))["scores"]
    assert models.difference(session.run({"x": X}, adapter="a")["scores"], want) < models.TOLERANCE


def test_many_tenants_derive_one_projection(graph, tmp_path, monkeypatch):
    path, base = graph
    files = [export_ort_adapter(graft(base, UNI, seed=i), tmp_path / f"{i}.onnx_adapter") for i in range(4)]
    other = export_ort_adapter(graft(base, METHODS["uniform"]), tmp_path / "other.onnx_adapter")
    derived = []
    original = UniLoRA.derive
    monkeypatch.setattr(UniLoRA, "derive", lambda self, *rest: derived.append(self) or original(self, *rest))
    session = OrtSession(path, threads=1)
    for i, file in enumerate([*files, other, *files]):
        session.load(f"t{i}", file)
    assert derived == [UNI, METHODS["uniform"]]
    assert np.array_equal(session.run({"x": X}, "t0")["scores"], session.run({"x": X}, "t5")["scores"])
    assert not np.array_equal(session.run({"x": X}, "t0")["scores"], session.run({"x": X}, "t1")["scores"])


def rewritten(file, change_json=None, change=None):
    """The file with another manifest or other tensors."""
    content = onnxruntime.AdapterFormat.read_adapter(str(file))
    values = {key: value.numpy().copy() for key, value in content.get_parameters().items()}
    text = json.loads(values["fxgraft.manifest"].tobytes())
    if change_json:
        change_json(text)
        values["fxgraft.manifest"] = np.frombuffer(json.dumps(text).encode(), dtype=np.uint8)
    if change:
        change(values)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(content.get_adapter_version())
    made.set_model_version(content.get_model_version())
    made.set_parameters({k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in values.items()})
    made.export_adapter(str(file))
    return file


def set_at(container, key, value):
    container[key] = value


@pytest.mark.parametrize(
    ("change_json", "change", "said"),
    [
        (lambda t: t.update(format=9), None, "structured format 9, this fxgraft reads 1; update it"),
        (lambda t: t["groups"][0]["method"].update(method="x"), None, "cannot be expanded: unknown method 'x'"),
        (lambda t: t["groups"][0]["method"].update(magic=1), None, "no field 'magic'"),
        (lambda t: t.pop("groups"), None, "cannot be expanded: 'groups'"),
        (lambda t: set_at(t["groups"][0]["sites"], "up", [11, 6, "float3"]), None, "unknown dtype 'float3'"),
        (lambda t: set_at(t["groups"][0]["sites"], "up", [11]), None, "cannot be expanded"),
        (lambda t: set_at(t["groups"][0]["sites"], "up", [2**40, 2**40, "float32"]), None, "would derive"),
        (lambda t: set_at(t["groups"][0]["sites"], "up", ["x", 6, "float32"]), None, "site 'up' is 'x' x 6"),
        (lambda t: t["groups"][0]["method"].update(rank=2**40), None, "would derive"),
        (lambda t: t["groups"][0]["method"].update(vector_length=2**50), None, "cannot be expanded"),
        (lambda t: t["groups"][0].update(sites=[]), None, "cannot be expanded"),
        (None, lambda v: v.pop("theta"), "lacks the tensor 'theta'"),
        (None, lambda v: set_at(v, "theta", v["theta"][:-1]), r"'theta' is torch.float32 \(39,\)"),
        (None, lambda v: set_at(v, "theta", v["theta"].astype(np.int32)), "its method has a floating type"),
        (None, lambda v: set_at(v, "more", v["theta"]), "has tensors its method does not have: 'more'"),
        (None, lambda v: set_at(v, "fxgraft.manifest", np.frombuffer(b"{no", np.uint8)), "is no JSON"),
        (None, lambda v: set_at(v, "fxgraft.manifest", np.frombuffer(b"[1]", np.uint8)), "is a list, not an object"),
    ],
)
def test_files_that_cannot_be_expanded(graph, tmp_path, change_json, change, said):
    path, base = graph
    file = rewritten(export_ort_adapter(graft(base, UNI), tmp_path / "a.onnx_adapter"), change_json, change)
    session = OrtSession(path, threads=1)
    with pytest.raises(fg.CheckpointError, match=said):
        session.load("a", file)
    assert session.adapters == {} and session.registered == {}


def test_a_structured_adapter_of_another_base_or_with_bad_numbers(graph, tmp_path):
    path, base = graph
    session = OrtSession(path, threads=1)
    other = export_ort_adapter(graft(models.classifier(seed=3), UNI), tmp_path / "other.onnx_adapter")
    with pytest.raises(fg.AdapterError, match="was trained on other base weights"):
        session.load("other", other)
    file = export_ort_adapter(graft(base, UNI), tmp_path / "nan.onnx_adapter")
    rewritten(file, change=lambda values: values["theta"].__setitem__(3, np.nan))
    with pytest.raises(fg.AdapterError, match="values that are not finite"):
        session.load("nan", file)


def test_tenants_share_their_frozen_tensors(graph, tmp_path):
    """A, B of LoRA-XS come from the base weights, so every tenant has the same: they are on disk once."""
    path, base = graph
    folder = tmp_path / "shared"
    folder.mkdir()
    tenants = [graft(base, METHODS["lora_xs"], seed=i) for i in range(3)]
    session = OrtSession(path, threads=1)
    for i, adapted in enumerate(tenants):
        file = export_ort_adapter(adapted, folder / f"{i}.onnx_adapter", share_frozen=True)
        session.load(f"own {i}", file)
        session.load(f"plain {i}", export_ort_adapter(adapted, tmp_path / f"{i}.onnx_adapter", expanded=True))
        own, plain = (session.run({"x": X}, adapter=f"{form} {i}")["scores"] for form in ("own", "plain"))
        assert np.array_equal(own, plain)
    (frozen,) = folder.glob("frozen-*.onnx_adapter")
    assert len(list(folder.iterdir())) == 4
    with pytest.raises(fg.CheckpointError, match="holds the frozen tensors that adapters beside it share"):
        session.load("frozen", frozen)
    content = frozen.read_bytes()
    frozen.write_bytes((tmp_path / "0.onnx_adapter").read_bytes())
    with pytest.raises(fg.CheckpointError, match="does not hold the frozen tensors the adapter was written with"):
        session.load("again", folder / "0.onnx_adapter")
    frozen.unlink()
    with pytest.raises(fg.CheckpointError, match=r"there is no adapter file .*frozen-"):
        session.load("again", folder / "0.onnx_adapter")
    frozen.write_bytes(content)
    session.load("again", folder / "0.onnx_adapter")
    # Nothing frozen, nothing beside.
    export_ort_adapter(graft(base, UNI), folder / "uni.onnx_adapter", share_frozen=True)
    assert len(list(folder.iterdir())) == 5


def test_indices_of_other_programs_are_kept(graph, tmp_path):
    """`stored` projections follow from no seed; they are frozen tensors, and so go along or beside."""
    path, base = graph
    adapted = graft(base, UNI)
    fg.save_adapter(adapted, tmp_path / "peft", format="peft", save_indices=True)
    loaded = fg.load_adapter(base, tmp_path / "peft").eval()
    session = OrtSession(path, threads=1)
    want = session.load("a", export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    for expanded, share in ((False, False), (False, True), (None, True), (None, False)):
        file = export_ort_adapter(loaded, tmp_path / "b.onnx_adapter", expanded=expanded, share_frozen=share)
        got = session.load("b", file, replace=True)
        for key, value in want.values.items():
            assert np.array_equal(got.values[key].numpy(), value.numpy())
