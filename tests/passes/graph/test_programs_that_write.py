"""Programs that write, under every pass: what a forward does beside returning a value happens, and in its order."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from methods import FIXED, graft
from mutating import INFERENCE_ONLY, PROGRAMS, WIDTH, Compared, Writes
from small_models import perturb

import fxgraft as fg
from fxgraft.passes.graph.cleanup import Cleanup
from fxgraft.passes.graph.fold import Fold
from fxgraft.passes.graph.join_products import JoinProducts
from fxgraft.passes.graph.pipelines import frozen, packaged
from fxgraft.passes.graph.share import Share
from fxgraft.passes.graph.siblings import Siblings
from fxgraft.rewriter.program import Pipeline


def adapted(program, method, training=False):
    model = graft(Writes(PROGRAMS[program]), fg.Spec(FIXED[method], targets=["q", "k"]))
    return perturb(model, 0.3).train(training)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def agree(one, other, x, calls=2):
    """The same outputs, call by call, the same state behind, and the same gradients."""
    for call in range(calls):
        torch.manual_seed(call)
        want = one(x.clone())
        torch.manual_seed(call)
        torch.testing.assert_close(other(x.clone()), want, rtol=1e-4, atol=1e-4)
    behind = state(one)
    for name, tensor in state(getattr(other, "_orig_mod", other)).items():
        torch.testing.assert_close(tensor, behind[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "method"), zip(PROGRAMS, itertools.cycle(FIXED), strict=False))
def test_inference(name, method):
    model = adapted(name, method)
    eager, backend = copy.deepcopy(model), Compared()
    with torch.no_grad():
        agree(eager, torch.compile(model, backend=backend), torch.randn(4, WIDTH))
    assert backend.graphs and backend.compared


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in INFERENCE_ONLY])
def test_training(name):
    model = adapted(name, "unilora" if "gradients" in name else "lora", training=True)
    eager, backend = copy.deepcopy(model), Compared()
    agree(eager, torch.compile(model, backend=backend), torch.randn(4, WIDTH), calls=1)
    assert backend.graphs and backend.compared


OWNED = {
    "frozen": frozen,
    "joined": Pipeline("joined", (Fold(), Cleanup(), JoinProducts(always=True), Cleanup())),
    "apart": Pipeline("apart", (Cleanup(), Share(), Siblings(always=True), JoinProducts(always=True), Cleanup())),
    "packaged": packaged,
}


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "a_weight_through_its_data"])  # no export
def test_programs_that_own_their_tensors(name):
    model = adapted(name, "unilora" if "weight" in name else "lora")
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        program = fg.capture(model, (x.clone(),))
        for title, pipeline in OWNED.items():
            own = dataclasses.replace(program, graph_module=copy.deepcopy(program.graph_module))
            once = copy.deepcopy(program.graph_module)
            made = pipeline(own).program.graph_module
            for call in range(2):
                ours, theirs = x.clone(), x.clone()
                torch.manual_seed(call)
                want = once(theirs)
                torch.manual_seed(call)
                torch.testing.assert_close(made(ours), want, rtol=1e-4, atol=1e-4, msg=lambda m, t=title: f"{t}: {m}")
                assert torch.equal(ours, theirs), title
            behind = state(once)
            for key, tensor in state(made).items():
                if key in behind:
                    torch.testing.assert_close(tensor, behind[key], rtol=1e-4, atol=1e-4)
