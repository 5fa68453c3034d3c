"""Adapted models on a quantised base leave it dequantised: as ONNX, as a package, and compiled as they are."""

from __future__ import annotations

import pytest
import torch
from quantised_layers import FEATURES, mlp
from small_models import perturb

import fxgraft as fg

X = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))


def adapted(kind, seed=0):
    torch.manual_seed(seed)
    result = fg.rewrite(mlp(kind), fg.Spec(fg.LoRA(2), ["up", "down"]))
    torch.manual_seed(seed)
    return perturb(result)


def near(ours, theirs, tolerance=2e-5):
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("kind", ["nf4", "torchao int4", "hqq"])
def test_onnx_merged(kind, tmp_path):
    model = adapted(kind)
    before = model(X).detach()  # in training: what the weights give, whatever kernel an evaluation has
    fg.export_onnx(model, tmp_path / "m.onnx", adapters="merged", example_inputs=(X,))
    (given,) = fg.OrtSession(tmp_path / "m.onnx").run({"x": X.numpy()}).values()
    near(given, before)
    assert torch.equal(model(X), before)


def test_onnx_swappable_and_in_few_bits(tmp_path):
    model, other = adapted("nf4"), adapted("nf4", seed=1)
    file = tmp_path / "m.onnx"
    fg.export_onnx(model, file, adapters="swappable", example_inputs=(X,))
    fg.export_ort_adapter(other, tmp_path / "other.onnx_adapter")
    session = fg.OrtSession(file)
    session.load("other", tmp_path / "other.onnx_adapter")
    (given,) = session.run({"x": X.numpy()}, adapter="other").values()
    near(given, other(X).detach())
    small = tmp_path / "small.onnx"
    fg.quantize_onnx(file, small, bits=4)
    assert small.stat().st_size < file.stat().st_size


def test_onnx_bank_and_bank(tmp_path):
    first, second = adapted("nf4"), adapted("nf4", seed=1)
    bank = fg.bank(mlp("nf4"), {"first": first, "second": second})
    ids = fg.adapter_ids(bank, ["first", None, "second"])
    rows = bank(X, adapter_ids=ids).detach()
    with fg.disabled(first):
        base = first(X).detach()
    near(rows, torch.stack([first(X)[0], base[1], second(X)[2]]).detach())
    fg.export_onnx(bank, tmp_path / "b.onnx", adapters="bank", example_inputs=(X,))
    (given,) = fg.OrtSession(tmp_path / "b.onnx").run({"x": X.numpy()}, adapter_ids=["first", None, "second"]).values()
    near(given, rows)


@pytest.mark.slow
def test_package(tmp_path):
    model = adapted("nf4")
    before = model(X).detach()
    fg.package(model, tmp_path / "m.pt2", example_inputs=(X,))
    near(fg.load_package(tmp_path / "m.pt2")(X), before)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int4", "hqq", "awq"])
@pytest.mark.parametrize("training", [True, False])
def test_captured_as_one_graph(kind, training):
    """bitsandbytes' layers settle their state at the first call, and are compiled once more then."""
    model = adapted(kind).train(training)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(3):
        given = compiled(X)
    if training:
        given.sum().backward()
        near(given.detach(), adapted(kind)(X).detach())
    assert graphs.frame_count <= (2 if kind in ("nf4", "fp4", "int8") else 1)
