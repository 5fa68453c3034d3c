"""Adapters beside layers whose weight is stored in few bits: held against twins with the weights dequantised."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from methods import METHODS, estimate, needs_estimate
from quantised_layers import FEATURES, HIDDEN, LAYERS, PackedLinear, mlp, torchao_layer, twin
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of

TARGETS = ["up", "down"]
pytestmark = pytest.mark.filterwarnings("ignore:.*dequantised at every call:UserWarning")


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def method_of(name):
    return fg.PRoLoRA(rank=4, unshared=1, a_chunks=2, b_chunks=2) if name == "prolora" else METHODS[name]


def grafted(model, method, start):
    """Adapted, and as `start` where the same adapter is on the dequantised twin."""
    spec = fg.Spec(method, TARGETS)
    torch.manual_seed(1)
    options = {"update": estimate(start, spec)} if needs_estimate(method) else {}
    torch.manual_seed(1)
    return fg.rewrite(model, spec, **options)


def pair(kind, method):
    """A model and its twin with the same adapter, and its parameters in both."""
    model = mlp(kind)
    plain = twin(model)
    both = [grafted(m, method, plain) for m in (model, plain)]
    ours, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in both)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name])  # what starts from the weight starts from the same
            assert parameter.dtype == torch.float32
            parameter.add_(torch.randn_like(parameter) * 0.1)
            theirs[name].copy_(parameter)
    return model, *both, ours, theirs


def near(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_dequantised_model(kind, name):
    _, ours, theirs, parameters, others = pair(kind, method_of(name))
    given = torch.randn(2, 5, FEATURES)
    x, y = given.clone().requires_grad_(), given.clone().requires_grad_()
    outputs = []
    for model, value in ((ours, x), (theirs, y)):
        torch.manual_seed(2)  # a supernet draws paths
        outputs.append(model(value))
    near(*outputs)
    seed = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(seed)
    near(x.grad, y.grad)
    for key, parameter in parameters.items():
        if others[key].grad is not None:
            near(parameter.grad, others[key].grad)
    assert any(p.grad is not None and p.grad.any() for p in parameters.values())


@pytest.mark.parametrize("name", ["lora", "unilora", "lora_xs"])
def test_lives_like_any_adapter(kind, name, tmp_path):
    model, ours, _, _, _ = pair(kind, method_of(name))
    keys, x = list(model.state_dict()), torch.randn(3, FEATURES)
    before, after = model(x), ours(x)
    state = set(ours.state_dict())
    assert set(keys) <= state
    assert any("fxgraft" in key and "up" in key for key in state) or name == "unilora"
    assert not torch.allclose(before, after)
    with fg.disabled(ours):
        assert torch.equal(ours(x), before)
    assert torch.equal(copy.deepcopy(ours)(x), after)
    fg.save_adapter(ours, tmp_path)
    assert torch.equal(fg.load_adapter(model, tmp_path)(x), after)
    plain = fg.load_adapter(twin(model), tmp_path)  # sites have the names that they have in a model in full precision
    near(plain(x), after)
    fg.remove(ours, "default")
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in ours.modules())
    assert torch.equal(ours(x), before)
    assert torch.equal(model(x), before)


def test_all_linear_finds_what_it_finds_in_full_precision(kind):
    def sites(model):
        adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["all-linear"]))
        return [(s.name, s.in_features, s.out_features) for s in record_of(adapted, "default").sites]

    model = mlp(kind)
    assert sites(model) == sites(twin(model)) == [("up", FEATURES, HIDDEN), ("down", HIDDEN, FEATURES)]


def test_parts_of_a_fused_weight(kind):
    spec = fg.Spec(fg.LoRA(2), [fg.Target("up", parts=2, select=[1])])
    model = mlp(kind)
    ours, theirs = fg.rewrite(model, spec), fg.rewrite(twin(model), spec)
    for adapted in (ours, theirs):
        nn.init.ones_(next(p for n, p in adapted.named_parameters() if n.endswith("B")))
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "fxgraft" in k}, strict=False)
    x, y = (torch.ones(2, FEATURES).requires_grad_() for _ in range(2))
    near(ours(x), theirs(y))
    ours(x).sum().backward()
    theirs(y).sum().backward()
    near(x.grad, y.grad)


def test_packing_for_a_cpu_changes_neither_gradients_nor_the_model_given():
    """On some CPUs an evaluation of bitsandbytes rewrites the weight, for a kernel without a gradient."""
    model, ours, theirs, parameters, others = pair("nf4", fg.LoRA(2))
    state = copy.copy(model.up.weight.quant_state.__dict__)
    x = torch.randn(3, FEATURES)
    with torch.no_grad():
        ours.eval()(x)
        with fg.disabled(ours):
            ours(x)
    ours.train()
    assert model.up.weight.quant_state.__dict__ == state
    for adapted in (ours, theirs):
        adapted(x).square().sum().backward()
    near(ours(x), theirs(x))
    for key, parameter in parameters.items():
        near(parameter.grad, others[key].grad)


@pytest.mark.parametrize("config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_dynamic_activations_are_served_and_not_trained(config, tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(FEATURES, HIDDEN))
    trained = fg.rewrite(plain, fg.Spec(fg.LoRA(2), ["0"]))
    nn.init.ones_(next(p for n, p in trained.named_parameters() if n.endswith("B")))
    fg.save_adapter(trained, tmp_path)
    model = nn.Sequential(torchao_layer(copy.deepcopy(plain[0]), config))
    with pytest.raises(fg.TargetError, match=r"'0'.*quantises the activations too.*weight-only"):
        fg.rewrite(model, fg.Spec(fg.LoRA(2), ["0"]))
    x = torch.randn(3, FEATURES)
    with torch.no_grad():
        served = fg.load_adapter(model, tmp_path)(x)
        near(served - model(x), trained(x) - plain(x), 1e-4)
    with pytest.raises(fg.AdapterError, match=r"cannot be trained through.*weight-only"):
        fg.load_adapter(model, tmp_path)(x.requires_grad_())


def test_int8_with_a_floating_weight_is_refused():
    model = nn.Sequential(LAYERS["int8"](nn.Linear(FEATURES, HIDDEN), has_fp16_weights=True))
    with pytest.raises(fg.TargetError, match=r"'0'.*has_fp16_weights=False"):
        fg.rewrite(model, fg.Spec(fg.LoRA(2), ["0"]))


def test_a_layer_that_is_not_quantised_yet_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(FEATURES, HIDDEN))
    with pytest.raises(fg.TargetError, match=r"'0'.*not quantised yet"):
        fg.rewrite(model, fg.Spec(fg.LoRA(2), ["0"]))


def test_what_a_product_with_the_weight_costs_is_said():
    model = mlp("gptq")
    with pytest.warns(UserWarning, match=r"dequantised at every call.*0.1 MiB"):
        fg.rewrite(model, fg.Spec(METHODS["glora"], TARGETS))


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq"])
def test_pickled_and_moved_to_bytes(kind):
    _, ours, _, _, _ = pair(kind, fg.LoRA(2))
    x = torch.randn(3, FEATURES)
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(x), ours(x))
    held = io.BytesIO()
    torch.save(ours.state_dict(), held)
    assert held.getvalue()


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq"])
def test_base_weights_are_shared(kind):
    """Codes and scales are those of the model that was given, whatever object holds them."""
    model = mlp(kind)
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), TARGETS))

    def tensors(module):
        held = [module.W_q, *module.meta.values()] if kind == "hqq" else [module.weight]
        if kind == "nf4":
            held += [module.weight.quant_state.absmax, module.quant_state.absmax, module.quant_state.state2.absmax]
        if kind == "int8":
            held += [
                t for t in (module.weight.CB, module.weight.SCB, module.state.CB, module.state.SCB) if t is not None
            ]
        return [t.data_ptr() for t in held if isinstance(t, torch.Tensor)]

    assert tensors(adapted.up) == tensors(model.up)
    model(torch.randn(2, FEATURES))
    adapted(torch.randn(2, FEATURES))
    assert tensors(adapted.up) == tensors(model.up)


def test_gradients_pass_a_layer_without_an_adapter_after_an_evaluation():
    model = mlp("nf4")
    ours, theirs = (fg.rewrite(m, fg.Spec(fg.LoRA(2), ["up"])) for m in (model, twin(model)))
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "fxgraft" in k}, strict=False)
    x = torch.randn(3, FEATURES)
    with torch.no_grad():
        ours.eval()(x)
    gradients = []
    for adapted in (ours.train(), theirs):
        adapted(x).square().sum().backward()
        gradients.append(next(p.grad for n, p in adapted.named_parameters() if p.requires_grad and n.endswith("B")))
    near(*gradients)


def test_a_quantised_layer_cannot_be_trained_in_full(kind):
    said = (
        r"train='up'|'up'.*no parameters|matches" if kind in ("gptq", "awq") else r"'up' is stored as .*fg.dequantise"
    )
    with pytest.raises(fg.TargetError, match=said):
        fg.rewrite(mlp(kind), fg.Spec(fg.LoRA(2), ["down"], train=["up"]))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int4"])
def test_its_bias_can_be_trained(kind):
    model = mlp(kind)
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["up"], train=["up.bias"]))
    bias = next(p for n, p in adapted.named_parameters() if n.endswith("trained_parameters.bias"))
    x = torch.randn(3, FEATURES)
    adapted(x).square().sum().backward()
    assert bias.grad is not None and bias.grad.any()
    with torch.no_grad():
        bias.add_(torch.randn_like(bias))
    near(fg.merge(adapted, dtype=torch.float32)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x))


def test_adapters_add_up_and_copies_do_not_meet(kind):
    """A second adapter's model is a copy of the first's: evaluating one packs nothing of the other."""
    first = fg.rewrite(mlp(kind), fg.Spec(fg.LoRA(2), TARGETS), name="a")
    both = fg.rewrite(first, fg.Spec(fg.VeRA(4), ["up"]), name="b")
    with torch.no_grad():
        for parameter in both.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        fg.set_active(both, {"a": 0.5, "b": -0.3})
        x = torch.randn(3, FEATURES)
        wanted = both(x)
        near(fg.merge(both, dtype=torch.float32)(x), wanted)
        both.eval()(x)
        third = fg.rewrite(both, fg.Spec(fg.LoRA(2), ["down"]), name="c").train()
        fg.set_active(third, {"a": 0.5, "b": -0.3})
        assert torch.equal(third(x), wanted)
        both.eval()(x)
        assert torch.equal(third(x), wanted)
        assert torch.equal(both.train()(x), wanted)


def test_nothing_is_dequantised_for_an_adapter_that_reads_no_weight(monkeypatch):
    read = []
    whole = PackedLinear.dequantize_weight
    monkeypatch.setattr(PackedLinear, "dequantize_weight", lambda self: read.append(self) or whole(self))
    model = mlp("gptq")
    read.clear()
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["up", "down"]))
    assert not read
    adapted(torch.randn(3, FEATURES))
    assert read  # so the count counts
