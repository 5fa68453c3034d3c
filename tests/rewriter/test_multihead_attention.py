"""Adapters inside `nn.MultiheadAttention`: every method and every verb, against a model of plain linears."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from methods import BANKED, BIAS_FREE, FIXED, MERGEABLE, METHODS, graft, supernet
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)
E, HEADS = 12, 2


class Block(nn.Module):
    """Attention over the input and over a memory, with one class for both."""

    def __init__(self, make, **options):
        super().__init__()
        self.own, self.cross, self.head = make(**options), make(**options), nn.Linear(E, 3)

    def forward(self, x, memory):
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.head(x + self.cross(x, memory, memory)[0])


def fused(**options):
    return nn.MultiheadAttention(E, HEADS, batch_first=True, **options)


class Written(nn.Module):
    """What `nn.MultiheadAttention` computes, with a linear for its packed weight."""

    def __init__(self, of):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        for linear, weight, bias in (
            (self.in_proj, of.in_proj_weight, of.in_proj_bias),
            (self.out_proj, of.out_proj.weight, of.out_proj.bias),
        ):
            linear.weight, linear.bias = weight, bias

    def forward(self, query, key, value, need_weights=True):
        q, k, v = self.in_proj(query)[..., :E], *self.in_proj(key)[..., E:].chunk(2, -1)
        q, k, v = (t.unflatten(-1, (HEADS, E // HEADS)).transpose(1, 2) for t in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def with_linears(model):
    twin = copy.deepcopy(model)
    twin.own, twin.cross = Written(twin.own), Written(twin.cross)
    return twin.train(model.training)


@pytest.fixture
def model():
    return Block(fused).eval()


@pytest.fixture
def given():
    return torch.randn(3, 5, E), torch.randn(3, 4, E)


SPEC = {"targets": ["in_proj_weight", "out_proj"]}


def twins(model, method):
    """An adapted model, and the same adapter in the model of plain linears."""
    adapted = perturb(graft(model, fg.Spec(method, **SPEC)))
    oracle = graft(with_linears(model), fg.Spec(method, ["in_proj", "out_proj"]))
    state = {key.replace("in_proj_weight.in_proj_weight", "in_proj"): t for key, t in fg.adapter_state(adapted).items()}
    state = {key.replace("in_proj_weight", "in_proj"): tensor for key, tensor in state.items()}
    fg.swap(oracle, state)
    return adapted, oracle


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_lives_there(model, given, method, tmp_path):
    adapted, oracle = twins(model, method)
    want = oracle(*given)
    assert not torch.allclose(want, model(*given), atol=1e-3)
    torch.testing.assert_close(adapted(*given), want)
    assert not adapted._forward_hooks  # the watched forward agrees
    if not supernet(method):
        for one in (adapted.train(), oracle.train()):
            one(*given).square().sum().backward()
        for name, parameter in oracle.named_parameters():
            if parameter.requires_grad:
                here = name.replace(".in_proj.fxgraft.default", ".fxgraft.default.in_proj_weight")
                torch.testing.assert_close(adapted.get_parameter(here).grad, parameter.grad, rtol=1e-4, atol=1e-5)
        adapted.eval()
        wide, expected = copy.deepcopy(adapted).double(), adapted(*given)
        assert relative_error(expected, wide(*(t.double() for t in given))) < 1e-5
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(twin(*given), want)
    with fg.disabled(adapted), torch.no_grad():
        assert torch.equal(adapted(*given), model(*given))
    loaded = fg.load_adapter(model, fg.save_adapter(adapted, tmp_path))
    torch.testing.assert_close(loaded(*given), want)
    if method in MERGEABLE.values():
        merged = fg.merge(adapted)
        assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
        with torch.no_grad():
            torch.testing.assert_close(merged(*given), want)
    second = perturb(fg.rewrite(adapted, fg.Spec(LORA, ["own.in_proj_weight", "cross.out_proj"]), name="second"))
    fg.set_active(second, {"default": 1.0, "second": -0.5})
    assert not torch.allclose(second(*given), want, atol=1e-3)
    if method in MERGEABLE.values():
        torch.testing.assert_close(fg.merge(second)(*given), second(*given))
    fg.set_active(second, ["default"])
    torch.testing.assert_close(second(*given), want)
    fg.remove(second, "default")
    fg.remove(second, "second")
    with torch.no_grad():
        assert torch.equal(second(*given), model(*given))
    assert [type(m) for m in second.modules()] == [type(m) for m in model.modules()]
    assert not any("fxgraft" in key for m in second.modules() for key in m.__dict__)


@pytest.mark.parametrize("method", FIXED.values(), ids=FIXED)
def test_one_graph_compiles(model, given, method):
    adapted = perturb(graft(model, fg.Spec(method, **SPEC)))
    want = adapted(*given)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(*given), want)


@pytest.mark.parametrize("method", BANKED.values(), ids=BANKED)
def test_a_bank_over_attention(model, given, method):
    model, given = model.double(), [one.double() for one in given]
    spec = fg.Spec(method, **SPEC)
    tenants = {name: perturb(graft(model, spec), 0.3) for name in "ab"}
    banked = fg.bank(model, tenants, spec=spec, example_inputs=tuple(given))
    got = banked(*given, adapter_ids=fg.adapter_ids(banked, ["b", None, "a"]))
    for row, one in enumerate((tenants["b"], model, tenants["a"])):
        torch.testing.assert_close(got[row], one(*given)[row])


def test_parts_of_the_packed_weight(model, given):
    target = fg.Target("in_proj_weight", parts=3, select=(0, 2))
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, [target, "out_proj"])))
    names = [row.site for row in fg.explain(adapted).rows]
    assert names[:3] == ["own.in_proj_weight[0]", "own.in_proj_weight[2]", "own.out_proj"]
    merged = fg.merge(adapted)
    torch.testing.assert_close(merged(*given), adapted(*given))
    assert torch.equal(merged.own.in_proj_weight[E : 2 * E], model.own.in_proj_weight[E : 2 * E])
    assert not torch.equal(merged.own.in_proj_weight[:E], model.own.in_proj_weight[:E])


@pytest.mark.parametrize("options", [{"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("name", MERGEABLE)
def test_other_attentions(options, name, given):
    model, method = Block(fused, **options).eval(), MERGEABLE[name]
    if name not in BIAS_FREE and not options.get("bias", True):
        with pytest.raises(fg.SpecError, match=r"gives 'own\.out_proj' a bias"):
            graft(model, fg.Spec(method, **SPEC))
        return
    adapted = perturb(graft(model, fg.Spec(method, **SPEC)))
    torch.testing.assert_close(fg.merge(adapted)(*given), adapted(*given))
    assert not torch.allclose(adapted(*given), model(*given), atol=1e-3)


class Apart(nn.Module):
    """Keys and values of other sizes: a weight for each."""

    def __init__(self, bias):
        super().__init__()
        self.a = nn.MultiheadAttention(E, HEADS, kdim=6, vdim=10, bias=bias)

    def forward(self, query, key, value):
        return self.a(query, key, value)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_weight_for_each(bias, name):
    model, method = Apart(bias).eval(), METHODS[name]
    given = torch.randn(4, 3, E), torch.randn(5, 3, 6), torch.randn(5, 3, 10)
    spec = fg.Spec(method, ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"])
    if name not in BIAS_FREE:
        with pytest.raises(fg.SpecError, match="a bias, and the owner's forward adds none"):
            graft(model, spec)
        return
    adapted = perturb(graft(model, spec))
    assert len([row for row in fg.explain(adapted).rows if row.kind != "shared"]) == 4
    assert not torch.allclose(adapted(*given), model(*given), atol=1e-3)
    if name in MERGEABLE:
        torch.testing.assert_close(fg.merge(adapted)(*given), adapted(*given))
    torch.testing.assert_close(copy.deepcopy(adapted)(*given), adapted(*given))
    with fg.disabled(adapted), torch.no_grad():
        assert torch.equal(adapted(*given), model(*given))


class Own(nn.MultiheadAttention):
    """A forward of its own, which nobody here knows."""

    def forward(self, query, key, value):
        return super().forward(query, key, value)[0] if query.sum() > 0 else query


class Kept(nn.MultiheadAttention):
    """The forward of torch."""


def test_classes_of_the_users():
    model = nn.ModuleDict({"own": Own(E, HEADS), "kept": Kept(E, HEADS)})
    for target in ("own.in_proj_weight", "own.out_proj"):
        with pytest.raises(fg.TargetError, match=r"cannot be adapted: .*torch.fx cannot trace the forward of Own"):
            fg.rewrite(model, fg.Spec(LORA, [target]))
    x = torch.randn(4, 3, E)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["kept.in_proj_weight", "kept.out_proj"])))
    assert isinstance(adapted["kept"], Kept)
    torch.testing.assert_close(fg.merge(adapted)["kept"](x, x, x)[0], adapted["kept"](x, x, x)[0])


def test_all_linear_reaches_it(model):
    adapted = fg.rewrite(model, fg.Spec(LORA))
    sites = {row.site for row in fg.explain(adapted).rows}
    assert {f"{a}.{w}" for a in ("own", "cross") for w in ("in_proj_weight", "out_proj")} <= sites


def test_one_graph_for_all(model, given):
    """Attentions of one kind share a class: a compiler sees one."""
    adapted = fg.rewrite(model, fg.Spec(LORA, **SPEC))
    assert type(adapted.own) is type(adapted.cross)
