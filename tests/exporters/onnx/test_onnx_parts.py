"""Parts of unequal sizes whose rows lie apart, in every mode of an export and in a package."""

import pytest
import torch
from methods import BANKED, FIXED, graft
from onnx_models import TOLERANCE, difference
from small_models import noisy
from torch import nn

import fxgraft as fg

TARGETS = [fg.Target("qkv", (6, 3, 3), (0, 2), groups=3), "out"]
X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(36, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.qkv(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Heads().eval()


def adapted(model, method, name="default", seed=1):
    return noisy(graft(model, fg.Spec(method, TARGETS), name), name, seed).eval()


SEVERAL = ("lora", "unilora", "hydralora", "glora", "vera")


@pytest.mark.parametrize("method", [FIXED[name] for name in SEVERAL], ids=SEVERAL)
def test_swappable_and_merged(model, method, tmp_path):
    ours = adapted(model, method)
    with torch.no_grad():
        want = ours(X)
    export = fg.export_onnx(ours, tmp_path / "m.onnx", (X,), adapters="swappable")
    assert export.adapter_inputs
    fg.export_ort_adapter(ours, tmp_path / "a.onnx_adapter")
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    session.load("a", tmp_path / "a.onnx_adapter")
    assert difference(session.run({"x": X}, adapter="a")["output"], want) < TOLERANCE
    assert difference(session.run({"x": X})["output"], model(X).detach()) < TOLERANCE
    if not method.unmergeable:
        fg.export_onnx(ours, tmp_path / "merged.onnx", (X,), adapters="merged")
        assert difference(fg.OrtSession(tmp_path / "merged.onnx", threads=1).run({"x": X})["output"], want) < TOLERANCE


@pytest.mark.parametrize("method", BANKED.values(), ids=BANKED)
def test_bank(model, method, tmp_path):
    own = {name: adapted(model, method, seed=seed) for seed, name in enumerate(("t0", "t1"))}
    fg.export_onnx(fg.bank(model, own), tmp_path / "m.onnx", (X,), adapters="bank")
    got = fg.OrtSession(tmp_path / "m.onnx", threads=1).run({"x": X}, adapter_ids=["t1", None, "t0"])["output"]
    with torch.no_grad():
        want = torch.stack([own["t1"](X)[0], model(X)[1], own["t0"](X)[2]])
    assert difference(got, want) < TOLERANCE
