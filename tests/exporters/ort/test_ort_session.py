"""OrtSession: what it runs, and every adapter and input it refuses."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_models as models
import onnxruntime
import pytest
import torch

import fxgraft as fg
from fxgraft.exporters.adapterfiles.adapter_format import read_adapter
from fxgraft.exporters.onnx.export import export_onnx
from fxgraft.exporters.ort.session import OrtSession, export_ort_adapter
from fxgraft.rewriter.errors import SessionError

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A classifier's swappable and merged graphs, and two adapters of different ranks with trained heads."""
    folder = tmp_path_factory.mktemp("ort")
    base = models.classifier()
    adapted = {
        "a": models.graft(base, ["up", "down"], rank=2, train=("head",), seed=1),
        "b": models.graft(base, ["up", "down"], rank=5, train=("head",), seed=2),
    }
    export_onnx(adapted["a"], folder / "m.onnx", (torch.from_numpy(X),), adapters="swappable")
    export_onnx(adapted["a"], folder / "merged.onnx", (torch.from_numpy(X),))
    for name, model in adapted.items():
        export_ort_adapter(model, folder / f"{name}.onnx_adapter")
    return folder, base, adapted


@pytest.fixture
def session(files):
    folder, *_ = files
    session = OrtSession(folder / "m.onnx", threads=1)
    for name in "ab":
        session.load(name, folder / f"{name}.onnx_adapter")
    return session


def tensors(path) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in read_adapter(path).values.items()}


def write(path, arrays, adapter_version=1, model_version=0):
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(adapter_version)
    content.set_model_version(model_version)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    content.set_parameters(values)
    content.export_adapter(str(path))
    return path


# -- running -------------------------------------------------------------------------------------------------------
def test_adapters_alternate(files, session):
    _, base, adapted = files
    with torch.no_grad():
        want = {name: model(torch.from_numpy(X)) for name, model in {**adapted, None: base}.items()}
    for name in ("a", None, "b", "a", "b", None):
        got = session.run({"x": X}, adapter=name)
        assert list(got) == ["scores", "hidden"]
        for key in got:
            assert models.difference(got[key], want[name][key]) < models.TOLERANCE, (name, key)
    assert models.difference(session.run({"x": X}, adapter="a")["scores"], want["b"]["scores"]) > 0.05
    assert session.adapters["a"].ranks == {"up": 2, "down": 2} and session.adapters["b"].ranks["up"] == 5


def test_an_adapter_is_bitwise_its_tensors_fed_by_hand(files, session):
    folder, *_ = files
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    plain = onnxruntime.InferenceSession(str(folder / "m.onnx"), options)
    fed = plain.run(["scores"], {"x": X, **tensors(folder / "b.onnx_adapter")})[0]
    np.testing.assert_array_equal(session.run({"x": X}, adapter="b")["scores"], fed)
    # And the file is one that onnxruntime's own active adapters take.
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(folder / "b.onnx_adapter"))
    run = onnxruntime.RunOptions()
    run.add_active_adapter(adapter)
    np.testing.assert_array_equal(plain.run(["scores"], {"x": X}, run)[0], fed)


def test_runs_from_many_threads_keep_their_adapters_apart(files, session):
    batches = [np.random.default_rng(i).standard_normal((1 + i % 5, 6)).astype(np.float32) for i in range(60)]
    jobs = [({"x": batch}, ("a", "b", None)[i % 3]) for i, batch in enumerate(batches)]
    alone = [session.run(inputs, adapter=name)["scores"] for inputs, name in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: session.run(job[0], adapter=job[1])["scores"], jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loaded_adapter_does_not_change_with_its_file(files, tmp_path):
    folder, *_ = files
    path = tmp_path / "c.onnx_adapter"
    path.write_bytes((folder / "a.onnx_adapter").read_bytes())
    session = OrtSession(folder / "m.onnx", threads=1)
    session.load("c", path)
    before = session.run({"x": X}, adapter="c")["scores"]
    path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(session.run({"x": X}, adapter="c")["scores"], before)


def test_torch_tensors_and_lists_are_inputs_too(session):
    want = session.run({"x": X}, adapter="a", outputs=["hidden"])
    got = session.run({"x": torch.from_numpy(X)}, adapter="a", outputs=["hidden"])
    assert list(got) == ["hidden"]
    np.testing.assert_array_equal(got["hidden"], want["hidden"])
    np.testing.assert_array_equal(session.run({"x": X[::2]})["scores"], session.run({"x": X[::2].copy()})["scores"])


# -- loading -------------------------------------------------------------------------------------------------------
def test_a_name_is_loaded_once(files, session):
    folder, *_ = files
    with pytest.raises(fg.AdapterError, match="'a' is loaded already; pass replace=True"):
        session.load("a", folder / "b.onnx_adapter")
    assert session.adapters["a"].ranks["up"] == 2
    session.load("a", folder / "b.onnx_adapter", replace=True)
    assert session.adapters["a"].ranks["up"] == 5
    session.unload("a")
    with pytest.raises(fg.AdapterError, match="no adapter 'a' is loaded; loaded: 'b'"):
        session.run({"x": X}, adapter="a")
    with pytest.raises(fg.AdapterError, match="no adapter 'a' is loaded"):
        session.unload("a")


def test_a_damaged_file(files, session, tmp_path):
    folder, *_ = files
    content = (folder / "a.onnx_adapter").read_bytes()
    for name, data in (
        ("cut", content[: len(content) * 2 // 3]),
        ("head", content[:10]),
        ("empty", b""),
        ("other", (folder / "m.onnx").read_bytes()),
        ("text", b"an adapter, honestly" * 20),
    ):
        path = tmp_path / f"{name}.onnx_adapter"
        path.write_bytes(data)
        with pytest.raises(fg.CheckpointError, match="is not an onnxruntime adapter file, or is damaged or cut short"):
            session.load(name, path)
    with pytest.raises(fg.CheckpointError, match="there is no adapter file"):
        session.load("none", tmp_path / "none.onnx_adapter")
    assert set(session.adapters) == {"a", "b"}


def cast(arrays, name, dtype):
    arrays[name] = arrays[name].astype(dtype)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: (a.pop("down.A"), a.pop("down.B")), r"incomplete: 'down\.A', 'down\.B' are missing.*partial=True"),
        (lambda a: a.pop("head.bias"), r"incomplete: 'head\.bias' is missing of the graph's 6"),
        (lambda a: a.pop("up.B"), r"incomplete: 'up\.B' is missing"),
        (
            lambda a: a.update({"side.A": a["up.A"]}),
            r"tensors the graph does not take: 'side\.A'; it takes 'head\.weight'",
        ),
        (lambda a: cast(a, "up.A", np.float64), r"'up\.A' is float64, the graph takes float32"),
        (lambda a: cast(a, "head.weight", np.int32), r"'head\.weight' is int32, the graph takes float32"),
        (lambda a: a.update({"up.A": a["up.A"][:-1]}), r"'up\.A' has shape \(5, 2\), the graph takes float32 \(6 x"),
        (lambda a: a.update({"up.A": a["up.A"].T.copy()}), r"'up\.A' has shape \(2, 6\)"),
        (lambda a: a.update({"head.bias": a["head.bias"][None]}), r"'head\.bias' has shape \(1, 3\)"),
        (lambda a: a.update({"up.A": a["up.A"][:, :1].copy()}), r"A and B of 'up' have different ranks"),
        (lambda a: a["up.B"].fill(np.nan), r"'up\.B' has values that are not finite"),
    ],
)
def test_adapters_that_do_not_fit(files, session, tmp_path, change, said):
    folder, *_ = files
    arrays = tensors(folder / "a.onnx_adapter")
    change(arrays)
    path = write(tmp_path / "bad.onnx_adapter", arrays)
    with pytest.raises(fg.AdapterError, match=said):
        session.load("bad", path, check_base=False)
    assert set(session.adapters) == {"a", "b"}


def test_partial_adapters_on_request_and_together(files, session, tmp_path):
    folder, *_ = files
    arrays = tensors(folder / "b.onnx_adapter")
    up = write(tmp_path / "up.onnx_adapter", {key: arrays[key] for key in ("up.A", "up.B")})
    rest = write(tmp_path / "rest.onnx_adapter", {key: arrays[key] for key in arrays if not key.startswith("up.")})
    session.load("up", up, partial=True)
    session.load("rest", rest, partial=True)
    both = session.run({"x": X}, adapter=["up", "rest"])["scores"]
    np.testing.assert_array_equal(both, session.run({"x": X}, adapter="b")["scores"])
    assert np.abs(session.run({"x": X}, adapter="up")["scores"] - both).max() > 1e-3
    with pytest.raises(
        fg.AdapterError, match=r"adapters 'up' and 'b' both set 'up\.A', 'up\.B': one run takes one value"
    ):
        session.run({"x": X}, adapter=["up", "b"])
    half = write(tmp_path / "half.onnx_adapter", {"up.A": arrays["up.A"]})
    with pytest.raises(fg.AdapterError, match=r"incomplete: 'up\.B' is missing"):
        session.load("half", half, partial=True)


def test_an_adapter_of_other_base_weights(files, session, tmp_path):
    other = models.graft(models.classifier(seed=4), ["up", "down"], rank=2, train=("head",))
    path = export_ort_adapter(other, tmp_path / "other.onnx_adapter")
    with pytest.raises(fg.AdapterError, match=r"was trained on other base weights.*check_base=False"):
        session.load("other", path)
    session.load("other", path, check_base=False)
    # Another head is no other base: heads are often new in every run.
    same = models.classifier()
    with torch.no_grad():
        same.head.weight.add_(1.0)
    path = export_ort_adapter(models.graft(same, ["up", "down"], train=("head",)), tmp_path / "same.onnx_adapter")
    assert session.load("same", path).ranks == {"up": 4, "down": 4}


def test_a_graph_without_room_for_adapters(files):
    folder, *_ = files
    session = OrtSession(folder / "merged.onnx", threads=1)
    with pytest.raises(fg.AdapterError, match=r"takes no adapters.*adapters='swappable'"):
        session.load("a", folder / "a.onnx_adapter")


def test_an_adapter_file_is_written_whole(files, tmp_path):
    _, _, adapted = files
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(b"the previous file")
    model = models.graft(models.classifier(), ["up"], rank=1)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "fxgraft" in n).fill_(float("inf"))
    with pytest.raises(fg.FxgraftError, match="not finite"):
        export_ort_adapter(model, path)
    assert path.read_bytes() == b"the previous file"
    assert export_ort_adapter(adapted["a"], path) == path
    assert sorted(tensors(path)) == ["down.A", "down.B", "head.bias", "head.weight", "up.A", "up.B"]
    with pytest.raises(fg.AdapterError, match="'other'"):
        export_ort_adapter(adapted["a"], path, name="other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx_adapter"]


# -- inputs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "missing 'x'"),
        ({"x": X, "y": X}, "unknown 'y'; it takes 'x'"),
        ({"X": X}, "unknown 'X', missing 'x'; it takes 'x'"),
        ({"x": X.astype(np.float64)}, "input 'x' is float64, the graph takes float32"),
        ({"x": X[0]}, r"input 'x' has 1 dimensions \(6,\), the graph takes float32 \(batch x 6\)"),
        ({"x": X[:, :5]}, "size 5 in axis 1"),
        ({"x": X, "up.A": X}, r"unknown 'up\.A'"),
        ([X], "inputs is a list"),
    ],
)
def test_inputs_that_do_not_fit(session, inputs, said):
    with pytest.raises(SessionError, match=said):
        session.run(inputs)


def test_inputs_that_do_not_fit_each_other(tmp_path):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 5)

        def forward(self, x, y):
            return self.up(x) * y

    model = models.graft(Pair().eval(), ["up"])
    export_onnx(model, tmp_path / "m.onnx", (torch.randn(3, 6), torch.randn(3, 5)))
    with pytest.raises(SessionError, match="'x' and 'y' have different sizes in axis 'batch': 4 and 2"):
        OrtSession(tmp_path / "m.onnx").run({"x": X, "y": X[:2, :5]})


def test_outputs_and_ids_the_graph_does_not_have(session):
    with pytest.raises(SessionError, match="unknown outputs 'logits'; the graph has 'scores', 'hidden'"):
        session.run({"x": X}, outputs=["logits"])
    with pytest.raises(SessionError, match="adapter_ids needs a graph with a bank"):
        session.run({"x": X}, adapter_ids=[0, 1, 0, 1])


def test_graphs_and_providers(files, tmp_path):
    folder, *_ = files
    with pytest.raises(SessionError, match="there is no graph"):
        OrtSession(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(SessionError, match="onnxruntime cannot load"):
        OrtSession(tmp_path / "m.onnx")
    with pytest.raises(SessionError, match="'NoSuchExecutionProvider' are not in this onnxruntime"):
        OrtSession(folder / "m.onnx", providers=["NoSuchExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(SessionError, match="providers is empty; this onnxruntime has"):
        OrtSession(folder / "m.onnx", providers=[])
    assert OrtSession(folder / "m.onnx", providers=["CPUExecutionProvider"]).providers == ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(SessionError, match="'CUDAExecutionProvider' are not in this onnxruntime"):
            OrtSession(folder / "m.onnx", providers=["CUDAExecutionProvider"])


def test_a_dropped_session_frees_its_graph_at_once(tmp_path):
    adapted = models.graft(models.classifier(), ["up"])
    export_onnx(adapted, tmp_path / "m.onnx", (torch.ones(2, 6),), adapters="swappable")
    session = OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    gone = weakref.ref(session)
    gc.disable()
    try:
        del session
        assert gone() is None
    finally:
        gc.enable()
