"""The "fxgraft" backend: one graph, the same numbers, training too, and no recompilation where none is due."""

import pytest
import torch
import torch._dynamo as dynamo
from methods import METHODS, graft
from small_models import perturb
from torch._dynamo.utils import counters

import fxgraft as fg
from fxgraft.passes.graph.pipelines import pipeline_for
from fxgraft.rewriter.program import Program


# One with tensors of its own and one that shares them: Inductor takes seconds. test_recompiles runs over all.
@pytest.fixture(params=["lora", "unilora"])
def method(request):
    return METHODS[request.param]


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()
    counters.clear()


def piped(gm, inputs):
    """What the backend does up to Inductor: the pipeline. Seconds instead of minutes for whole families."""
    program = Program(gm, tuple(inputs), training=torch.is_grad_enabled())
    return pipeline_for(program)(program).program.graph_module.forward


@pytest.fixture
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dialect_nodes_reach_the_backend_and_stay_one_node(bert, ids, method):
    adapted = graft(bert, fg.Spec(method, ["query", "value"]))
    seen = []

    def spy(gm, inputs):
        seen.append([n for n in gm.graph.nodes if "fxgraft." in str(n.target)])
        return gm.forward

    torch.compile(adapted, backend=spy, fullgraph=True)(ids)
    assert len(seen) == 1 and len(seen[0]) == 4
    (operator,) = {str(n.target) for n in seen[0]}
    assert operator.startswith("fxgraft.lora_xs." if method.key == "lora_sb" else f"fxgraft.{method.key}")


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_families_without_graph_breaks(family, request, ids, method):
    model = request.getfixturevalue(family)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if family == "vit" else {"input_ids": ids}
    if family == "llama":
        inputs["use_cache"] = False
    adapted = perturb(fg.rewrite(model, fg.Spec(method)))
    compiled = torch.compile(adapted, backend=piped, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_inference_through_inductor(bert, ids, method):
    adapted = perturb(fg.rewrite(bert, fg.Spec(method, ["query", "value"])))
    compiled = fg.compile(adapted, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_training_gives_the_eager_gradients(bert, ids, method):
    adapted = perturb(fg.rewrite(bert, fg.Spec(method, ["query", "value"], train=["classifier"])))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    labels = torch.tensor([0, 1, 0])
    expected = torch.autograd.grad(adapted(ids, labels=labels).loss, parameters)
    compiled = fg.compile(adapted, fullgraph=True)
    got = torch.autograd.grad(compiled(ids, labels=labels).loss, parameters)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_swap_switch_and_disabled_do_not_recompile(bert, ids, method):
    adapted = perturb(fg.rewrite(bert, fg.Spec(method, ["query", "value"], train=["classifier"])))
    adapted = perturb(fg.rewrite(adapted, fg.Spec(method, ["query", "value"], train=["classifier"]), name="b"))
    compiled = torch.compile(adapted, backend=piped, fullgraph=True)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
            return compiled(ids).logits

    b = check()
    with fg.disabled(compiled):
        base = check()
    graphs = counters["stats"]["unique_graphs"]
    with dynamo.config.patch(error_on_recompile=True):
        fg.set_active(compiled, ["default"])
        default = check()
        fg.swap(compiled, {k: v * 2 for k, v in fg.adapter_state(adapted).items()})
        swapped = check()
        with fg.disabled(compiled):
            assert torch.equal(check(), base)
        fg.set_active(compiled, ["b"])
        assert torch.equal(check(), b)
    assert counters["stats"]["unique_graphs"] == graphs == 2
    assert not torch.equal(default, b) and not torch.equal(default, swapped)


def test_compiling_blocks_compiles_one_block(bert, ids):
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(3))))
    with torch.no_grad():
        expected = adapted(ids).logits
        for layer in adapted.bert.encoder.layer:
            layer.compile(backend=piped)
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_dynamic_shapes(bert, ids):
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(3), ["query"])))
    compiled = torch.compile(adapted, backend=piped, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 5), (3, 7), (5, 11)):
            x = torch.randint(3, 90, shape)
            torch.testing.assert_close(compiled(x).logits, adapted(x).logits, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2


def test_merged_models_compile_plainly(bert, ids, method):
    merged = fg.merge(perturb(fg.rewrite(bert, fg.Spec(method, ["query"]))))
    compiled = torch.compile(merged, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, merged(ids).logits)


def test_unknown_options_are_refused(mlp):
    with pytest.raises(fg.FxgraftError, match="always uses the backend"):
        fg.compile(mlp, backend="eager")


def test_inductor_options_are_passed_on(mlp):
    adapted = perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["up"])))
    compiled = fg.compile(adapted, options={"fallback_random": True})
    torch.testing.assert_close(compiled(torch.ones(2, 7)), adapted(torch.ones(2, 7)), rtol=1e-4, atol=1e-5)


def test_explain_says_what_the_passes_did(bert, ids):
    adapted = perturb(
        fg.rewrite(bert, fg.Spec(fg.UniLoRA(rank=2, vector_length=64), targets=["query", "key", "value"]))
    )
    fast = fg.compile(adapted)
    assert fg.explain(fast).compiled == ()
    with torch.no_grad():
        fast(ids)
    (note,) = fg.explain(fast).compiled
    assert note.pipeline == "inference" and sum(note.made.values()) > 0
    made_by = {made_by for made_by, _ in note.made}
    assert "Share" in made_by and made_by & {"Choose", "Siblings"}
    text = str(fg.explain(adapted))
    assert "compiled with the pipeline inference:" in text and "rows" in text
