"""Wrong arguments to everything that writes, opens or runs a graph: one of our errors, whatever the argument."""

from __future__ import annotations

import random

import numpy as np
import onnx_models as models
import pytest
import torch

import fxgraft as fg

X = torch.linspace(-1, 1, 24).reshape(4, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misuse")
    torch.manual_seed(0)
    adapted = models.graft(models.classifier(), ["up", "down"])
    fg.export_onnx(adapted, folder / "m.onnx", (X,), adapters="swappable", check=False)
    fg.export_ort_adapter(adapted, folder / "a.onnx_adapter")
    session = fg.OrtSession(folder / "m.onnx")
    session.load("a", folder / "a.onnx_adapter")
    return folder, adapted, session


CALLS = {
    "session of a number": lambda f, a, s: fg.OrtSession(3),
    "session of a folder": lambda f, a, s: fg.OrtSession(f),
    "threads in words": lambda f, a, s: fg.OrtSession(f / "m.onnx", threads="2"),
    "one provider": lambda f, a, s: fg.OrtSession(f / "m.onnx", providers="CPUExecutionProvider"),
    "a number for a provider": lambda f, a, s: fg.OrtSession(f / "m.onnx", providers=[3]),
    "load of nothing": lambda f, a, s: s.load("c", None),
    "register of nothing": lambda f, a, s: s.register("c", None),
    "a number for a name": lambda f, a, s: s.load(3, f / "a.onnx_adapter"),
    "no inputs": lambda f, a, s: s.run(None),
    "an object": lambda f, a, s: s.run({"x": object()}),
    "a ragged list": lambda f, a, s: s.run({"x": [[1.0], [1.0, 2.0]]}),
    "a sparse tensor": lambda f, a, s: s.run({"x": X.to_sparse()}),
    "a meta tensor": lambda f, a, s: s.run({"x": X.to("meta")}),
    "an adapter's number": lambda f, a, s: s.run({"x": X}, adapter=3),
    "an adapter's list": lambda f, a, s: s.run({"x": X}, adapter=[["a"]]),
    "outputs in one word": lambda f, a, s: s.run({"x": X}, outputs="scores"),
    "export to nothing": lambda f, a, s: fg.export_onnx(a, None, (X,)),
    "a tolerance in words": lambda f, a, s: fg.export_onnx(a, f / "z.onnx", (X,), tolerance="loose"),
    "a negative tolerance": lambda f, a, s: fg.export_onnx(a, f / "z.onnx", (X,), tolerance=-1.0),
    "a seed in words": lambda f, a, s: fg.export_onnx(a, f / "z.onnx", (X,), seed="x"),
    "a meta model": lambda f, a, s: fg.export_onnx(models.classifier().to("meta"), f / "z.onnx", (X,)),
    "an adapter to nothing": lambda f, a, s: fg.export_ort_adapter(a, None),
    "an adapter of a number": lambda f, a, s: fg.export_ort_adapter(3, f / "z.onnx_adapter"),
    "verify of nothing": lambda f, a, s: fg.verify(None),
    "verify with a word for a seed": lambda f, a, s: fg.verify(f / "m.onnx", seed="x"),
    "quantise nothing": lambda f, a, s: fg.quantize_onnx(None, f / "z.onnx"),
    "quantise to nothing": lambda f, a, s: fg.quantize_onnx(f / "m.onnx", None),
    "blocks of seven": lambda f, a, s: fg.quantize_onnx(f / "m.onnx", f / "z.onnx", 4, block_size=7),
    "quantise an adapter": lambda f, a, s: fg.quantize_onnx(f / "a.onnx_adapter", f / "z.onnx"),
}


@pytest.mark.parametrize("what", CALLS)
def test_wrong_arguments(made, what):
    with pytest.raises(fg.FxgraftError) as caught:
        CALLS[what](*made)
    assert len(str(caught.value)) > 20
    assert sorted(path.name for path in made[0].iterdir()) == ["a.onnx_adapter", "m.onnx"]


def test_damaged_graphs_open_or_say_why(made, tmp_path):
    folder, *_ = made
    whole, chance, refused = (folder / "m.onnx").read_bytes(), random.Random(0), 0
    file = tmp_path / "m.onnx"
    for _ in range(60):
        data = bytearray(whole)
        place = chance.randrange(len(data))
        data[place : place + 3] = chance.choice([b"\xff\xff\xff", b"\x80", b""])
        file.write_bytes(data)
        if data == whole:
            continue
        with pytest.raises(fg.VerifyError):
            fg.OrtSession(file, verify=True)
        try:
            fg.OrtSession(file)
        except fg.FxgraftError:
            refused += 1
    assert refused > 20


def test_another_models_adapter_is_refused(made, tmp_path):
    *_, session = made
    other = models.graft(models.classifier(seed=1), ["up", "down"])
    path = fg.export_ort_adapter(other, tmp_path / "o.onnx_adapter")
    with pytest.raises(fg.AdapterError, match="trained on other base weights"):
        session.load("other", path)
    path = fg.export_ort_adapter(models.graft(models.classifier(), ["up"]), tmp_path / "o.onnx_adapter")
    with pytest.raises(fg.AdapterError, match="incomplete"):
        session.load("other", path)
    assert list(session.adapters) == ["a"]
    assert np.isfinite(session.run({"x": X}, adapter="a")["scores"]).all()
