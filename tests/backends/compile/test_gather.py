"""One operator gathers the factors of all sites on a CPU: the same numbers and gradients, and a reason elsewhere."""

from __future__ import annotations

import torch
from captured_attention import Attention, captured, printed
from small_models import perturb

import fxgraft as fg
from fxgraft.backends.compile.gather_apart import GatherApart, gathered_factors
from fxgraft.passes.graph import pipelines
from fxgraft.passes.methods.unilora.gather import all_factors

METHOD = fg.UniLoRA(rank=2, vector_length=50, init_bound=0.5)


def adapted() -> torch.nn.Module:
    return perturb(fg.rewrite(Attention().eval(), fg.Spec(METHOD, targets=["q", "k", "v", "out"])), 0.3).eval()


def test_factors_and_the_gradient_of_the_vector():
    torch.manual_seed(0)
    counts = torch.randint(1, 5, (20,), dtype=torch.uint8)
    indices = [torch.randint(0, 20, shape, dtype=torch.int32) for shape in ((3, 4), (2, 7), (5, 1))]
    results = []
    for function, dtype in ((gathered_factors, torch.float32), (all_factors, torch.float64)):
        theta = torch.linspace(-1, 1, 20, dtype=dtype).requires_grad_()
        factors = function(theta, counts, indices)
        sum(((i + 1) * f.square()).sum() for i, f in enumerate(factors)).backward()
        results.append((factors, theta.grad))
    (ours, grad), (oracle, want) = results
    for one, other in zip(ours, oracle, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-6)


def test_a_factor_nobody_reads_has_no_part_in_the_gradient():
    theta = torch.ones(4, requires_grad=True)
    first, _ = gathered_factors(theta, torch.ones(4, dtype=torch.uint8), [torch.tensor([[0, 1]]), torch.tensor([[3]])])
    first.sum().backward()
    assert theta.grad.tolist() == [1, 1, 0, 0]


def test_compiled_models_use_it_and_packages_do_not(monkeypatch):
    model = adapted()
    compiled = fg.compile(model, fullgraph=True)
    x = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert "GatherApart made 1 nodes (8 factors, one call)" in str(fg.explain(compiled))
    assert " = all_factors(" in printed(pipelines.packaged(captured(model)).program)


def test_training_gives_the_eager_gradients():
    model = adapted().train()
    x = torch.randn(5, 12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), parameters)
    got = torch.autograd.grad(fg.compile(model, fullgraph=True)(x).square().sum(), parameters)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_tensors_elsewhere_are_left():
    program = pipelines.inference(captured(adapted())).program
    (node,) = [n for n in program.graph.nodes if n.target is all_factors]
    theta = node.args[0]
    theta.meta["val"] = torch.empty(50, device="meta")
    result = GatherApart()(program)
    assert result.count == 0 and "not all on a CPU" in result.no_matches[0].reason
