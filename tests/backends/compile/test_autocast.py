"""Autocast and models in narrow or wide dtypes: a compiled model tells at least as much of the delta as an eager one.

Thousands of rows, so that the cost rules fire.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from mutating import PIPELINES
from torch import nn

import fxgraft as fg
from fxgraft.passes.graph.join_products import JoinProducts
from fxgraft.passes.graph.pipelines import frozen, inference
from fxgraft.rewriter.program import Program

METHODS = {
    "lora": (fg.LoRA(rank=4), 3e-3),
    "lora_xs": (fg.LoRAXS(rank=8), 3e-2),
    "unilora": (fg.UniLoRA(rank=4, vector_length=800, init_bound=0.5), 0.1),
    "prolora": (fg.PRoLoRA(rank=4, unshared=1, a_chunks=4, b_chunks=4), 1e-2),
    "hydralora": (fg.HydraLoRA(rank=4, experts=2), 1e-2),
    "glora": (fg.GLoRA(rank=2, path=fg.GLoRAPath(A="none", B="lora", C="lora", D="vector", E="vector")), 3e-3),
    "glora rows": (fg.GLoRA(rank=2, path=fg.GLoRAPath(A="vector", B="lora", C="none", D="none", E="none")), 3e-3),
}
WIDTH, ROWS = 64, 4096


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], -1)


class Partly(Two):
    """q under autocast, k not."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            q = self.q(x)
        return torch.cat([q.float(), self.k(x)], -1)


class Nested(Two):
    """Autocast around, but not for k."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            q = self.q(x)
            with torch.autocast("cpu", enabled=False):
                k = self.k(x)
        return torch.cat([q.float(), k], -1)


def made(method, dtype=torch.float32, factors=None, model=Two):
    config, scale = METHODS[method]
    base = model().eval()
    adapted = fg.rewrite(base, fg.Spec(config, targets=["q", "k"]))
    values = {key: torch.randn_like(tensor) * scale for key, tensor in fg.adapter_state(adapted).items()}
    fg.swap(adapted, values)
    base, adapted = base.to(dtype), adapted.to(dtype)
    if factors is not None:
        for name, parameter in adapted.named_parameters():
            if "fxgraft" in name:
                parameter.data = parameter.data.to(factors)
    return base, adapted


def autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def told(y, base, true):
    """Correlation of what an adapter changed with what it should have changed."""
    return float(
        torch.corrcoef(torch.stack([(y.detach().double() - base.detach().double()).flatten(), true.flatten()]))[0, 1]
    )


def error(y, oracle):
    return float((y.detach().double() - oracle).square().mean().sqrt())


class Every:
    """A `torch.compile` backend that keeps the graph of every pipeline and runs the one that is asked for."""

    def __init__(self):
        self.graphs, self.name = {}, None

    def __call__(self, gm, inputs):
        self.graphs[None] = gm
        for name, pipeline in PIPELINES.items():
            program = Program(copy.deepcopy(gm), tuple(inputs), training=torch.is_grad_enabled())
            self.graphs[name] = pipeline(program).program.graph_module
        return lambda *arguments: self.graphs[self.name](*arguments)


CASES = {
    "bfloat16 autocast": {"around": torch.bfloat16},
    "float16 autocast": {"around": torch.float16},
    "bfloat16 model": {"dtype": torch.bfloat16, "factors": torch.float32},
    "bfloat16 model under autocast": {"dtype": torch.bfloat16, "factors": torch.float32, "around": torch.bfloat16},
    "float64 model": {"dtype": torch.float64, "factors": torch.float32},
    "narrow factors": {"factors": torch.bfloat16},
    "autocast within": {"model": Partly},
    "none within": {"model": Nested},
    "none within, autocast around": {"model": Nested, "around": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES)
def test_every_pipeline_tells_as_much_of_the_delta(case, training):
    compare("lora", training, **CASES[case])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_every_method_under_autocast(method):
    compare(method, False, around=torch.bfloat16)
    compare(method, True, around=torch.bfloat16)


def compare(method, training, around=None, **how):
    base, adapted = made(method, **how)
    x = torch.randn(ROWS, WIDTH).to(next(base.parameters()).dtype)
    plain = how | {"model": Two} if "model" in how else how
    wide, wide_base = (_wide(model, plain) for model in (adapted, base))
    with torch.no_grad():
        oracle = wide(x.double())
        true = oracle - wide_base(x.double())
    backend = Every()
    compiled = torch.compile(adapted, backend=backend)
    leaves = [p for p in adapted.parameters() if p.requires_grad]
    with torch.set_grad_enabled(training), autocast(around):
        reference, want = base(x), adapted(x)
        limit, spread = told(want, reference, true), error(want, oracle)
        grads = torch.autograd.grad(want.double().square().sum(), leaves) if training else []
        for name in [None, *PIPELINES]:
            backend.name = name
            y = compiled(x)
            assert told(y, reference, true) > limit - 0.02, name
            assert error(y, oracle) < 1.2 * spread + 1e-12, name
            found = torch.autograd.grad(y.double().square().sum(), leaves) if training else []
            for one, other in zip(found, grads, strict=True):
                assert one.dtype == other.dtype
                assert error(one, other.double()) < 0.02 * float(other.double().square().mean().sqrt()) + 1e-12, name


def _wide(model, how):
    """The model in float64, without what it says of autocast."""
    twin = copy.deepcopy(model).double()
    if isinstance(twin, (Partly, Nested)):
        return lambda x: torch.cat([twin.q(x), twin.k(x)], -1)
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_program_tells_as_much(method, dtype):
    base, adapted = made(method, dtype=dtype, factors=torch.float32)
    x = torch.randn(ROWS, WIDTH).to(dtype)
    oracle = copy.deepcopy(adapted).double()(x.double()).detach()
    true = oracle - copy.deepcopy(base).double()(x.double()).detach()
    with torch.no_grad():
        want, reference = adapted(x), base(x)
        program = fg.capture(adapted, (x,))
        for pipeline in (frozen, inference, (*frozen, JoinProducts(always=True))):
            result = program
            for step in pipeline:
                result = step(result).program
            y = result.graph_module(x)
            assert told(y, reference, true) > told(want, reference, true) - 0.02
            assert error(y, oracle) < 1.2 * error(want, oracle) + 1e-12


def test_folding_under_autocast_rounds_nothing():
    _, adapted = made("lora_xs")
    x = torch.randn(8, WIDTH)
    want = adapted(x)
    program = fg.capture(adapted, (x,))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        folded = frozen(program).program.graph_module
    torch.testing.assert_close(folded(x), want, rtol=1e-5, atol=1e-5)


def test_through_inductor():
    base, adapted = made("lora")
    x = torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        oracle = copy.deepcopy(adapted).double()(x.double())
        true = oracle - copy.deepcopy(base).double()(x.double())
    compiled = fg.compile(adapted)
    leaves = [p for p in adapted.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        reference, want, got = base(x), adapted(x), compiled(x)
    assert told(got, reference, true) > told(want, reference, true) - 0.02
    grads = torch.autograd.grad(want.float().sum(), leaves)
    for one, other in zip(torch.autograd.grad(got.float().sum(), leaves), grads, strict=True):
        assert error(one, other.double()) < 0.02 * float(other.square().mean().sqrt())
