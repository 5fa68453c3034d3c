"""Adapters on experts in ONNX graphs: merged, as inputs, and what to do where the base's own experts do not export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expert_models import made, mixtral, tokens
from small_models import noisy

import fxgraft as fg

pytest.importorskip("onnxruntime")


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def adapted(implementation="batched_mm", method=None):
    model = made(lambda: mixtral(num_hidden_layers=1))
    model.set_experts_implementation(implementation)
    spec = fg.Spec(method or fg.UniLoRA(rank=3, vector_length=40), targets=["gate_up_proj", "down_proj"])
    return noisy(fg.rewrite(Logits(model).eval(), spec), "default", 1)


def run(session, **options):
    out = session.run({"input_ids": tokens().numpy()}, **options)
    return next(iter(out.values())) if isinstance(out, dict) else out[0]


def test_adapters_of_experts_are_inputs_of_a_graph_and_load_from_their_files(tmp_path):
    model = adapted()
    fg.export_onnx(model, tmp_path / "m.onnx", (tokens(),), adapters="swappable")
    fg.export_ort_adapter(model, tmp_path / "own.onnx_adapter", expanded=False)
    fg.export_ort_adapter(model, tmp_path / "factors.onnx_adapter", expanded=True)
    session = fg.OrtSession(tmp_path / "m.onnx")
    with torch.no_grad():
        expected = model(tokens()).numpy()
        with fg.disabled(model):
            base = model(tokens()).numpy()
    assert np.abs(expected - base).max() > 1e-4
    np.testing.assert_allclose(run(session), base, atol=1e-5)
    for name in ("own", "factors"):
        session.load(name, tmp_path / f"{name}.onnx_adapter")
        np.testing.assert_allclose(run(session, adapter=name), expected, atol=1e-5)
    twice = run(session, adapter={"own": 0.5, "factors": 0.5})
    np.testing.assert_allclose(twice, expected, atol=1e-5)


def test_merged_experts_export(tmp_path):
    model = adapted(method=fg.LoRA(rank=3))
    fg.export_onnx(model, tmp_path / "m.onnx", (tokens(),), adapters="merged")
    with torch.no_grad():
        np.testing.assert_allclose(run(fg.OrtSession(tmp_path / "m.onnx")), model(tokens()).numpy(), atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_that_do_not_export_say_what_to_set(implementation, tmp_path):
    model = adapted(implementation)
    with pytest.raises(fg.ExportError, match=r"set_experts_implementation\('batched_mm'\)"):
        fg.export_onnx(model, tmp_path / "m.onnx", (tokens(),), adapters="merged")
