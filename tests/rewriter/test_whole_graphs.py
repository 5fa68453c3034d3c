"""GraphModule and ExportedProgram in, the same form out."""

import copy
import pickle

import pytest
import torch
from methods import FIXED, LOW_RANK, MERGEABLE, graft
from small_models import perturb
from torch import fx, nn
from torch.export import Dim

import fxgraft as fg


@pytest.fixture(params=FIXED)  # a graph is in training mode forever, where a supernet draws its paths
def method(request):
    return FIXED[request.param]


@pytest.fixture
def exported(bert, ids):
    return torch.export.export(bert, (ids,), dynamic_shapes=({0: Dim("batch"), 1: Dim.AUTO},), strict=False)


def test_exported_program(bert, ids, exported, method):
    keys = list(exported.state_dict)
    adapted = graft(exported, fg.Spec(method, ["query", "dense"]))
    assert isinstance(adapted, torch.export.ExportedProgram) and list(exported.state_dict) == keys
    assert set(keys) <= set(adapted.state_dict)
    operator = "lora_xs" if method.key == "lora_sb" else method.key
    nodes = [n for n in adapted.graph.nodes if str(n.target) == f"fxgraft.{operator}.default"]
    assert len(nodes) == 9
    other = torch.randint(3, 90, (5, 12))
    expected = graft(bert, fg.Spec(method, ["query", "dense"]))
    fg.swap(
        expected,
        {
            k: adapted.state_dict[f"fxgraft_shared.default.{k}" if k == "theta" else _key(k)].detach()
            for k in fg.adapter_state(expected)
        },
    )
    torch.testing.assert_close(adapted.module()(other).logits, expected(other).logits, rtol=1e-5, atol=1e-6)


def _key(name):
    site, _, tensor = name.rpartition(".")
    return f"{site}.fxgraft.default.{tensor}"


def test_an_exported_graph_module(bert, ids, exported, method):
    gm = exported.module(check_guards=False)
    nodes = len(gm.graph.nodes)
    adapted = perturb(graft(gm, fg.Spec(method, ["query", "dense"])))
    assert isinstance(adapted, fx.GraphModule) and len(gm.graph.nodes) == nodes
    assert set(bert.state_dict()) - {"bert.embeddings.position_ids"} <= set(adapted.state_dict())
    out = adapted(ids).logits
    assert not torch.allclose(out, bert(ids).logits)
    with fg.disabled(adapted):
        assert torch.equal(adapted(ids).logits, bert(ids).logits)
    if method in MERGEABLE.values():
        torch.testing.assert_close(fg.merge(adapted)(ids).logits, out, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(ids).logits, out) and fg.explain(twin).trainable == fg.explain(adapted).trainable
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in adapted.named_parameters()]


def test_a_symbolically_traced_module(method):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    gm = fx.symbolic_trace(model)
    adapted = perturb(graft(gm, fg.Spec(method)))
    x = torch.randn(5, 8)
    assert isinstance(adapted, fx.GraphModule) and not torch.allclose(adapted(x), model(x))
    if method in MERGEABLE.values():
        torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    twin = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(twin(x), adapted(x)) and fg.active(twin) == ["default"]


def test_linears_that_follow_each_other(mlp):
    x = torch.randn(3, 7)
    gm = torch.export.export(mlp, (x,)).module(check_guards=False)
    adapted = perturb(fg.rewrite(gm, fg.Spec(fg.LoRA(2), ["up", "down", "head"])))
    assert not torch.allclose(adapted(x), mlp(x))
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-5, atol=1e-6)


def test_weights_that_are_attributes_of_the_graph():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return x @ self.inner.weight + 1

    gm = fx.symbolic_trace(Raw())
    adapted = perturb(fg.rewrite(gm, fg.Spec(fg.LoRA(2), ["inner"])))
    x = torch.randn(3, 6)
    assert next(iter(adapted.state_dict())) == "inner.weight" and not torch.allclose(adapted(x), gm(x))
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))


def test_a_program_without_example_inputs(exported):
    exported._example_inputs = None
    with pytest.raises(fg.CaptureError, match="no example inputs"):
        fg.rewrite(exported, fg.Spec(fg.LoRA(2), ["query"]))


def test_an_adapter_trained_on_the_model_loads_onto_its_exported_graph(bert, ids, exported, method, tmp_path):
    """The exported module lists its submodules in another order; the projection must not follow it."""
    trained = perturb(graft(bert, fg.Spec(method, ["query", "dense"])))
    fg.save_adapter(trained, tmp_path)
    gm = exported.module(check_guards=False)
    torch.testing.assert_close(fg.load_adapter(gm, tmp_path)(ids).logits, trained(ids).logits, rtol=1e-5, atol=1e-6)


class Roots(nn.Module):
    """Weights of the root itself, one written into after its product, beside a layer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.v = nn.Parameter(torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(4))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = nn.functional.linear(x, self.w)
        h.add_(5.0)
        return self.last(torch.tanh(h) @ self.v + self.b)


class Named(nn.Module):
    """A weight and a bias of other names, on a module that nobody calls."""

    def __init__(self):
        super().__init__()
        self.w = nn.Module()
        self.w.kernel = nn.Parameter(torch.randn(6, 4))
        self.w.offset = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return nn.functional.linear(x, self.w.kernel, self.w.offset)


# GLoRA changes the bias too, and a bare weight has none.
@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("targets", [["w"], "all-linear"], ids=str)
@pytest.mark.parametrize("model", [Roots, Named])
def test_weights_of_the_root_and_of_other_names(model, targets, method):
    model, x = model(), torch.randn(3, 4)
    targets = ["w.kernel"] if targets == ["w"] and isinstance(model, Named) else targets
    gm = fx.symbolic_trace(model)
    adapted = perturb(graft(gm, fg.Spec(method, targets)), 0.5)
    out = adapted(x)
    assert not torch.allclose(out, model(x), atol=1e-3) and torch.equal(gm(x), model(x))
    assert [k for k in adapted.state_dict() if "fxgraft" not in k] == list(gm.state_dict())
    torch.testing.assert_close(fg.merge(adapted)(x), out, rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(x), out) and fg.active(twin) == ["default"]
    again = fg.rewrite(adapted, fg.Spec(fg.LoRA(2), targets), "b")
    fg.set_active(again, ["default"])
    torch.testing.assert_close(again(x), out)
    with fg.disabled(adapted):
        assert torch.equal(adapted(x), model(x))
    torch.testing.assert_close(fg.capture(adapted, (x,)).graph_module(x), out, rtol=1e-4, atol=1e-5)
    fg.remove(adapted, "default")
    assert torch.equal(adapted(x), model(x)) and list(adapted.state_dict()) == list(gm.state_dict())


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("model", [Roots, Named])
def test_weights_of_the_root_of_an_exported_program(model, method):
    model, x = model(), torch.randn(3, 4)
    program = torch.export.export(model, (x,), strict=False)
    adapted = graft(program, fg.Spec(method, "all-linear"))
    fresh = adapted.module()(x)
    assert method.key != "lora" or torch.allclose(fresh, model(x), atol=1e-6)
    with torch.no_grad():
        for key, tensor in adapted.state_dict.items():
            if "fxgraft" in key and tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor))
    expected = graft(model, fg.Spec(method, "all-linear")) if isinstance(model, Roots) else None
    assert not torch.allclose(adapted.module()(x), fresh, atol=1e-3)
    if expected is not None:
        state = {k: adapted.state_dict[_root_key(k)].detach() for k in fg.adapter_state(expected)}
        fg.swap(expected, state)
        torch.testing.assert_close(adapted.module()(x), expected(x), rtol=1e-4, atol=1e-5)


def _root_key(name):
    if name == "theta":
        return "fxgraft_shared.default.theta"
    site, _, tensor = name.rpartition(".")
    return f"last.fxgraft.default.{tensor}" if site == "last" else f"fxgraft.default.{site}.{tensor}"


def test_a_layer_whose_weight_the_graph_reads_too_is_refused():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x) + self.q.weight.norm()

    gm = fx.symbolic_trace(Reads())
    with pytest.raises(fg.TargetError, match="reads this weight without calling"):
        fg.rewrite(gm, fg.Spec(fg.LoRA(2), ["q"]))


def test_a_graph_with_adapters_at_its_root_is_not_compiled_without_them():
    adapted = fg.rewrite(fx.symbolic_trace(Roots()), fg.Spec(fg.LoRA(2), ["w"]))
    with pytest.raises(fg.CaptureError, match=r"fg\.merge"):
        adapted.recompile()
