"""Adapted experts under Dynamo: one graph, as the base's implementations are, and the numbers of the eager model."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo as dynamo
from expert_models import made, mixtral, tokens
from small_models import noisy, relative_error

import fxgraft as fg

pytest.importorskip("transformers")


def adapted(method, implementation):
    model = made(lambda: mixtral(num_hidden_layers=1))
    model.set_experts_implementation(implementation)
    return noisy(fg.rewrite(model, fg.Spec(method, targets=["gate_up_proj", "down_proj"])), "default", 1)


def gradients(model, run):
    model.zero_grad()
    out = run(input_ids=tokens()).logits
    out.square().sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


SLOW = pytest.mark.slow
CASES = [
    pytest.param(fg.LoRA(rank=3), "grouped_mm", id="lora-grouped"),
    pytest.param(fg.LoRA(rank=3), "batched_mm", id="lora-batched", marks=SLOW),
    pytest.param(fg.VeRA(rank=4), "grouped_mm", id="vera-grouped", marks=SLOW),
    pytest.param(fg.VeRA(rank=4), "batched_mm", id="vera-batched", marks=SLOW),
]


@pytest.mark.parametrize(("method", "implementation"), CASES)
def test_one_graph_and_no_new_one_for_other_values(method, implementation):
    model = adapted(method, implementation)
    expected, expected_grads = gradients(model, model)
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, grads = gradients(model, compiled)
    assert relative_error(out, expected) < 1e-5
    assert all(relative_error(grads[n], expected_grads[n]) < 1e-4 for n in expected_grads)
    noisy(model, "default", 5)
    assert relative_error(compiled(input_ids=tokens()).logits, model(tokens()).logits) < 1e-5
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with fg.disabled(model):
        assert relative_error(compiled(input_ids=tokens()).logits, model(tokens()).logits) < 1e-5


def test_torch_export_follows_the_adapters():
    model = adapted(fg.UniLoRA(rank=2, vector_length=20, init_bound=0.5), "batched_mm")
    program = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=False)
    out = program.module()(input_ids=tokens(), use_cache=False).logits
    assert relative_error(out, model(tokens()).logits) < 1e-5


@pytest.mark.slow
def test_inductor_computes_the_same():
    model = adapted(fg.LoRA(rank=3), "grouped_mm")
    expected, _ = gradients(model, model)
    dynamo.reset()
    out, _ = gradients(model, fg.compile(model, fullgraph=True))
    assert relative_error(out, expected) < 1e-5
