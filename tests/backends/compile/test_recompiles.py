"""What compiles anew and what does not: adapters come and go, values change, sizes change; every graph is counted.

The backend of these tests is the pipeline of "fxgraft" without Inductor: Dynamo decides what is compiled anew, whatever
compiles the graphs. One test at the end counts through `fg.compile`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from methods import METHODS, graft
from small_models import perturb
from torch import nn
from torch._dynamo.utils import counters

import fxgraft as fg
from fxgraft.passes.graph.pipelines import pipeline_for
from fxgraft.rewriter.program import Program

TARGETS = {
    "bert": ["query", "value"],
    "vit": ["q_proj", "fc1"],
    "llama": ["q_proj", "down_proj"],
    "qwen": ["k_proj", "down_proj"],
}
PRECISIONS = ("float32", "autocast", "bfloat16")
# Of the largest value. bfloat16 has 8 bits; the passes sum in another order, over two layers and their gradients.
TOLERANCES = {"float32": 1e-4, "autocast": 5e-2, "bfloat16": 5e-2}


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()
    counters.clear()


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=[False, True], ids=["inference", "training"])
def training(request):
    return request.param


class Counting:
    """The pipeline, and how many graphs came through it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        program = Program(gm, tuple(inputs), training=torch.is_grad_enabled())
        return pipeline_for(program)(program).program.graph_module.forward


class Checked:
    """A model compiled whole. Every run is compared with the model itself, gradients too; `new` counts graphs."""

    def __init__(self, adapted: nn.Module, training: bool):
        self.backend = Counting()
        self.adapted, self.training = adapted.train(training), training
        self.compiled = torch.compile(adapted, backend=self.backend, fullgraph=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the compiled model."""
        results = []
        for model in (self.adapted, self.compiled):
            torch.manual_seed(7)  # a supernet in training draws its paths
            with torch.set_grad_enabled(self.training):
                out = model(x)
            trained = [p for p in self.adapted.parameters() if p.requires_grad]
            grads = ()
            if out.requires_grad:  # inside `disabled` nothing of the base trains
                grads = torch.autograd.grad(out.square().mean(), trained, allow_unused=True)
            results.append((out.detach(), *grads))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
        return results[1][0]

    def new(self, x: torch.Tensor) -> int:
        """How many graphs one more run compiles."""
        before = self.backend.graphs
        self(x)
        return self.backend.graphs - before


def adapters(model: nn.Module, *methods: Any) -> nn.Module:
    """The model with an adapter `a`, `b`, ... for each method, the last one active."""
    for name, method in zip("abc", methods, strict=False):
        model = perturb(graft(model, fg.Spec(method, ["up", "down"], train=["head"]), name=name))
    return model


def test_switching_between_adapters_of_one_structure(mlp, method, training):
    model, x = Checked(adapters(mlp, method, method), training), torch.randn(4, 7)
    b = model(x)
    assert model.backend.graphs == 1
    fg.set_active(model.compiled, ["a"])
    with dynamo.config.patch(error_on_recompile=True):
        a = model(x)
        fg.set_active(model.compiled, ["b"])
        assert torch.equal(model(x), b)
    assert model.backend.graphs == 1 and not torch.equal(a, b)


def test_switching_between_adapters_of_two_structures(mlp, method, training):
    other = fg.LoRA(rank=4) if method.key != "lora" else fg.LoRAXS(rank=4)
    model, x = Checked(adapters(mlp, method, other), training), torch.randn(4, 7)
    assert model.new(x) == 1
    fg.set_active(model.compiled, ["a"])
    assert model.new(x) == 1
    for names in (["b"], ["a"], ["b"]):
        fg.set_active(model.compiled, names)
        assert model.new(x) == 0, names


def test_swapped_values(mlp, method, training):
    model, x = Checked(adapters(mlp, method), training), torch.randn(4, 7)
    before = model(x)
    for factor in (2.0, 0.0, 1.0):
        state = {key: tensor * factor for key, tensor in fg.adapter_state(model.adapted, "a").items()}
        fg.swap(model.compiled, state, "a")
        after = model(x)
    assert model.backend.graphs == 1 and not torch.equal(before, after)


def test_disabled_and_enabled(mlp, method, training):
    model, x = Checked(adapters(mlp, method), training), torch.randn(4, 7)
    assert model.new(x) == 1
    with fg.disabled(model.compiled):
        assert model.new(x) == 1
        assert torch.equal(model(x), mlp(x).detach())
    for _ in range(2):
        assert model.new(x) == 0
        with fg.disabled(model.compiled):
            assert model.new(x) == 0


def test_several_active_adapters(mlp, method):
    adapted = graft(mlp, fg.Spec(method, ["up"]), name="a")
    adapted = perturb(graft(perturb(adapted), fg.Spec(method, ["up", "down"]), name="b"))
    model, x = Checked(adapted, training=False), torch.randn(4, 7)
    choices = (["b"], ["a", "b"], ["a"], [])
    for names in choices:
        fg.set_active(model.compiled, names)
        assert model.new(x) == 1, names
    for names in (*choices, *reversed(choices)):
        fg.set_active(model.compiled, names)
        assert model.new(x) == 0, names


def test_a_supernet_draws_a_path_at_every_forward_of_one_graph(mlp):
    adapted = adapters(mlp, METHODS["supernet"]).train()
    backend, x = Counting(), torch.randn(4, 7)
    compiled = torch.compile(adapted, backend=backend, fullgraph=True)
    torch.manual_seed(0)
    with dynamo.config.patch(error_on_recompile=True):
        drawn = [compiled(x).detach() for _ in range(6)]
    assert backend.graphs == 1
    assert len({tuple(out.flatten().tolist()) for out in drawn}) > 3


def test_a_supernets_path_in_evaluation_is_data(mlp):
    model, x = Checked(adapters(mlp, METHODS["supernet"]), training=False), torch.randn(4, 7)
    before = model(x)
    path = fg.GLoRAPath(A="vector", B="none", C="lora", D="none", E="vector")
    fg.set_paths(model.adapted, dict.fromkeys(fg.get_paths(model.adapted, "a"), path), "a")
    assert model.new(x) == 0 and not torch.equal(model(x), before)


def test_training_steps_do_not_compile_anew(mlp, method):
    adapted, x = adapters(mlp, method, method).train(), torch.randn(4, 7)
    backend = Counting()
    compiled = torch.compile(adapted, backend=backend, fullgraph=True)
    for name in ("b", "a", "b"):
        fg.set_active(compiled, [name])
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
        before = {k: t.clone() for k, t in fg.adapter_state(adapted, name).items()}
        for _ in range(2):
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()
        assert any(not torch.equal(t, before[k]) for k, t in fg.adapter_state(adapted, name).items())
    assert backend.graphs == 1


# -- families ------------------------------------------------------------------------------------------------------
@pytest.fixture
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture
def qwen():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        head_dim=8, vocab_size=90,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def example(family: str, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16).to(dtype)}
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 90, (batch, length))}
    return inputs if family == "bert" else inputs | {"use_cache": False}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", TARGETS)
def test_families_are_one_graph_of_any_size(family, precision, training, request):
    model = request.getfixturevalue(family)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    adapted = perturb(fg.rewrite(model.to(dtype), fg.Spec(fg.LoRA(rank=4), TARGETS[family]), dtype=dtype))
    backend = Counting()
    compiled = torch.compile(adapted, backend=backend, fullgraph=True, dynamic=True)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for sizes in ((2, 6), (3, 9), (5, 13)):
        inputs = example(family, *sizes, dtype)
        results = []
        for run in (adapted, compiled):
            with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
                logits = run(**inputs).logits
            grads = torch.autograd.grad(logits.float().square().mean(), trained) if training else ()
            results.append((logits.detach(), *grads))
        for got, want in zip(*reversed(results), strict=True):
            assert got.dtype == want.dtype
            assert (got - want).abs().max() <= TOLERANCES[precision] * want.abs().max(), (family, sizes)
        assert backend.graphs == 1 and not counters["graph_break"], sizes


# -- with Inductor -------------------------------------------------------------------------------------------------
def test_through_inductor(mlp):
    adapted, x = adapters(mlp, fg.LoRA(rank=2), fg.LoRA(rank=2)), torch.randn(4, 7)
    compiled = fg.compile(adapted, fullgraph=True)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), adapted(x), rtol=1e-4, atol=1e-6)

    check()
    with fg.disabled(compiled):
        check()
    graphs = counters["stats"]["unique_graphs"]
    with dynamo.config.patch(error_on_recompile=True):
        for name in ("a", "b"):
            fg.set_active(compiled, [name])
            check()
            fg.swap(compiled, {k: t + 0.1 for k, t in fg.adapter_state(adapted, name).items()}, name)
            check()
            with fg.disabled(compiled):
                check()
    assert counters["stats"]["unique_graphs"] == graphs == 2
