"""Providers, and runs with bound inputs: the way of a GPU, on the CPU."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_models as models
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, save

import fxgraft as fg
from fxgraft.exporters.adapterfiles.ort_values import Device, to_array, to_ort, to_torch
from fxgraft.exporters.onnx.export import export_onnx
from fxgraft.exporters.ort import providers as ort_providers
from fxgraft.exporters.ort.session import OrtSession, export_ort_adapter
from fxgraft.rewriter.errors import SessionError

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binding")
    base = models.classifier()
    for name, rank in (("a", 2), ("b", 5)):
        adapted = models.graft(base, ["up", "down"], rank=rank, train=("head",), seed=rank)
        export_ort_adapter(adapted, folder / f"{name}.onnx_adapter")
    export_onnx(adapted, folder / "m.onnx", (torch.from_numpy(X),), adapters="swappable")
    return folder


def opened(folder, **options) -> OrtSession:
    session = OrtSession(folder / "m.onnx", threads=1, **options)
    for name in "ab":
        session.load(name, folder / f"{name}.onnx_adapter")
    return session


def test_bound_runs_equal_fed_ones_bit_for_bit(files):
    bound, fed = opened(files, binding=True), opened(files)
    assert bound.binding and not fed.binding and bound.device == Device("cpu", 0)
    for name in ("a", None, "b", "a", None):
        for outputs in (None, ["hidden"], ["hidden", "scores"]):
            one = bound.run({"x": X}, adapter=name, outputs=outputs)
            other = fed.run({"x": X}, adapter=name, outputs=outputs)
            assert list(one) == list(other) == (outputs or ["scores", "hidden"])
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])


def test_onnxruntimes_active_adapters_do_not_apply_to_bound_runs(files):
    """Why adapter tensors are bound as inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(files / "m.onnx"), options)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(files / "a.onnx_adapter"))
    run = onnxruntime.RunOptions()
    run.add_active_adapter(adapter)
    binding = session.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("scores")
    try:
        session.run_with_iobinding(binding, run)
    except Exception as error:  # the other way in which they do not apply
        assert "adapter" in str(error).lower()
        return
    base = session.run(["scores"], {"x": X})[0]
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], base)


def test_bound_runs_from_many_threads(files):
    session = opened(files, binding=True)
    jobs = [
        (np.random.default_rng(i).standard_normal((1 + i % 5, 6)).astype(np.float32), ("a", "b", None)[i % 3])
        for i in range(120)
    ]
    alone = [session.run({"x": x}, adapter=name)["scores"] for x, name in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: session.run({"x": job[0]}, adapter=job[1])["scores"], jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_adapter_values_stay_on_the_device(files):
    session = opened(files, binding=True)
    before = {key: value.data_ptr() for key, value in session.adapters["a"].values.items()}
    session.run({"x": X}, adapter="a")
    session.run({"x": X}, adapter="b")
    assert {key: value.data_ptr() for key, value in session.adapters["a"].values.items()} == before


def test_errors_of_bound_runs(files):
    session = opened(files, binding=True)
    with pytest.raises(SessionError, match="input 'x' is float64"):
        session.run({"x": X.astype(np.float64)})
    with pytest.raises(fg.AdapterError, match="no adapter 'c' is loaded"):
        session.run({"x": X}, adapter="c")


# -- providers -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_a_missing_provider_says_how_to_get_it(files):
    for name, said in ((CUDA, "pip install onnxruntime-gpu"), ("TensorrtExecutionProvider", "tensorrt")):
        with pytest.raises(SessionError, match=f"'{name}' are not in this onnxruntime, which has .*{said}"):
            OrtSession(files / "m.onnx", providers=[name, "CPUExecutionProvider"])
    for providers in (None, ["CPUExecutionProvider"]):
        with pytest.raises(SessionError, match=r"strict=True forbids the CPU.*pip install onnxruntime-gpu"):
            OrtSession(files / "m.onnx", providers=providers, strict=True)


class Started:
    """A stand-in for a session on the given providers."""

    def __init__(self, providers, options=()):
        self._providers, self._options = providers, dict(options)

    def get_providers(self):
        return self._providers

    def get_provider_options(self):
        return {name: self._options.get(name, {}) for name in self._providers}


@pytest.fixture
def build(monkeypatch):
    """An onnxruntime that lists CUDA; `build(outcome)` says what asking for it gives."""
    asked = []

    def set_outcome(outcome):
        def session(path, options, providers, enable_fallback):
            asked.append((providers, options))
            assert enable_fallback == 0
            names = [entry if isinstance(entry, str) else entry[0] for entry in providers]
            return outcome(names) if CUDA in names else Started(names)

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        return asked

    return set_outcome


def refuse(names):
    raise RuntimeError("no driver")


def test_a_provider_that_does_not_start(files, build):
    path = files / "m.onnx"
    for outcome, said in ((lambda names: Started(["CPUExecutionProvider"]), "would run on"), (refuse, "no driver")):
        build(outcome)
        for options in ({"providers": [CUDA]}, {"providers": [(CUDA, {"device_id": 1})]}, {"strict": True}):
            with pytest.raises(SessionError, match=said):
                ort_providers.start(path, options.get("providers"), None, options.get("strict", False))
        # Nobody asked for it: the CPU will do, but not in silence.
        with pytest.warns(UserWarning, match=f"'{CUDA}' did not start .*{said}.*runs on the CPU.*onnxruntime-gpu"):
            assert ort_providers.start(path, None, None, False).get_providers() == ["CPUExecutionProvider"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ort_providers.start(path, ["CPUExecutionProvider"], None, False)


def test_what_is_asked_of_onnxruntime(files, build):
    asked = build(Started)
    path = files / "m.onnx"
    ort_providers.start(path, None, None, False)
    ort_providers.start(path, [(CUDA, {"device_id": "1"}), "CPUExecutionProvider"], 2, True)
    assert [providers for providers, _ in asked] == [[CUDA, "CPUExecutionProvider"], [(CUDA, {"device_id": "1"})]]
    key = "session.disable_cpu_ep_fallback"
    assert asked[1][1].get_session_config_entry(key) == "1" and asked[1][1].intra_op_num_threads == 2
    with pytest.raises(RuntimeError):
        asked[0][1].get_session_config_entry(key)


@pytest.mark.parametrize("provider", [CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"])
def test_the_device_of_a_provider(provider):
    assert ort_providers.device_of(Started([provider, "CPUExecutionProvider"])) == Device("cuda", 0)
    assert ort_providers.device_of(Started([provider], {provider: {"device_id": "3"}})) == Device("cuda", 3)
    assert ort_providers.device_of(Started(["CPUExecutionProvider"])) == Device("cpu", 0)


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu")
def test_cuda_agrees_with_the_cpu(files):
    gpu, cpu = opened(files, providers=[CUDA]), opened(files, providers=["CPUExecutionProvider"])
    assert gpu.binding and gpu.device.type == "cuda"
    with pytest.raises(SessionError, match="binding=False"):
        OrtSession(files / "m.onnx", providers=[CUDA], binding=False)
    for name in ("a", None, "b"):
        got, want = (session.run({"x": X}, adapter=name)["scores"] for session in (gpu, cpu))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert gpu.adapters["a"].values["up.A"].device_name() == "cuda"


# -- values --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(3, 4), (4, 0), ()])
def test_values_of_every_dtype(dtype, shape):
    tensor = (torch.randn(shape) * 4).to(dtype)
    value = to_ort(tensor)
    assert tuple(value.shape()) == shape
    back = to_torch(value)
    assert back.dtype is dtype and torch.equal(back, tensor)
    if tensor.numel():
        assert back.data_ptr() != value.data_ptr()
    wide = to_array(value)
    assert wide.dtype.name == ("float32" if dtype is torch.bfloat16 else str(dtype).removeprefix("torch."))
    np.testing.assert_array_equal(wide, (tensor.float() if dtype is torch.bfloat16 else tensor).numpy())


@pytest.mark.parametrize("binding", [False, True])
def test_bfloat16_inputs_and_outputs(tmp_path, binding):
    node = helper.make_node("Identity", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", 2]) for name in "xy"]
    graph = helper.make_graph([node], "same", ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    session = OrtSession(tmp_path / "m.onnx", binding=binding)
    x = torch.randn(3, 2).bfloat16()
    np.testing.assert_array_equal(session.run({"x": x.t().contiguous().t()})["y"], x.float().numpy())
    with pytest.raises(SessionError, match="input 'x' is float32, the graph takes bfloat16"):
        session.run({"x": x.float()})
