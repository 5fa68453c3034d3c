"""A parent that reads a layer's weight: seen at rewrite and refused, or the adapter goes into the parent's product."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from methods import BANKED, BIAS_FREE, MERGEABLE, graft
from small_models import perturb
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)
LAST = "reads the base's values of"


# -- refused at once ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """As WavLM, torchvision's Swin, timm's BEiT and EVA02: the products are the parent's."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = getattr(self, self.how)(x)
        return self.out(y)

    def never(self, x):
        return self.k(x)


class Product(Attention):
    def forward(self, x):
        return self.out(F.linear(x, self.q.weight, self.q.bias) + self.k(x))


class Transposed(Attention):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return self.out(x @ self.q.weight.t().contiguous())


class Joined(Attention):
    def forward(self, x):
        weight = torch.cat([self.q.weight, self.k.weight])
        return self.out(F.linear(x, weight)[..., :4])


class Also(Attention):
    def forward(self, x):
        return self.q(x) + F.linear(x, self.q.weight)


class Grandparent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention("never")

    def forward(self, x):
        return x @ self.inner.q.weight


class Slow(Attention):
    """As Mamba's dt_proj: in a branch, but called nowhere."""

    def forward(self, x):
        if x.sum() > -1e9:
            return self.out(x @ self.q.weight)
        return self.out(x)


@pytest.mark.parametrize("cls", [Joined, Also, Slow])
def test_a_parent_that_reads_the_weight_is_seen_at_rewrite(cls):
    for model in (cls("never"), nn.Sequential(cls("never"), cls("never"))):
        with pytest.raises(fg.TargetError, match=rf"q' cannot be adapted: {cls.__name__} .*without calling the layer"):
            fg.rewrite(model, fg.Spec(LORA, ["q"]))
        with pytest.warns(UserWarning, match="left out"):
            adapted = fg.rewrite(model, fg.Spec(LORA))
        assert not any(row.site.endswith("q") for row in fg.explain(adapted).rows)
        fg.rewrite(model, fg.Spec(LORA, ["out"] if cls is not Also else ["k"]))


@pytest.mark.parametrize("method", BIAS_FREE.values(), ids=BIAS_FREE)
@pytest.mark.parametrize("cls", [Product, Transposed])
def test_an_adapter_goes_into_the_product_of_the_parent(cls, method, tmp_path):
    """The model whose layers are called where the parent takes their weights is the oracle."""
    model = nn.Sequential(cls("never"), nn.Tanh(), cls("never")).eval()
    oracle = copy.deepcopy(model)
    for part in (oracle[0], oracle[2]):
        part.__class__ = Called if cls is Product else CalledTransposed
    spec, x = fg.Spec(method, ["q", "out"]), torch.randn(3, 5, 4)
    adapted, expected = perturb(graft(model, spec)), graft(oracle, spec)
    state = fg.adapter_state(adapted)
    fg.swap(expected, dict(state))
    want = expected(x)
    assert list(state) == list(fg.adapter_state(expected))
    assert not torch.allclose(want, model(x), atol=1e-3)
    torch.testing.assert_close(adapted(x), want)
    assert not adapted._forward_hooks  # the watched forward agrees
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("fxgraft" in name)
    adapted(x).sum().backward()
    expected(x).sum().backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad)
    if method in MERGEABLE.values():
        torch.testing.assert_close(fg.merge(adapted)(x), want)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(twin(x), want)
    loaded = fg.load_adapter(model, fg.save_adapter(adapted, tmp_path))
    torch.testing.assert_close(loaded(x), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(x), want)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))
    second = perturb(fg.rewrite(adapted, fg.Spec(LORA, ["q"]), name="second"))
    fg.set_active(second, ["default", "second"])
    assert not torch.allclose(second(x), want, atol=1e-3)
    fg.set_active(second, ["default"])
    torch.testing.assert_close(second(x), want)
    fg.remove(second, "default")
    fg.remove(second, "second")
    torch.testing.assert_close(second(x), model(x))
    assert [type(m) for m in second.modules()] == [type(m) for m in model.modules()]
    assert not any("fxgraft" in key for m in second.modules() for key in m.__dict__)


class Called(Attention):
    def forward(self, x):
        return self.out(self.q(x) + self.k(x))


class CalledTransposed(Attention):
    def forward(self, x):
        return self.out(self.q(x) - self.q.bias)


def test_what_a_product_of_the_parent_cannot_be(tmp_path):
    model = Product("never")
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    with pytest.raises(fg.CheckpointError, match="without calling them"):
        fg.save_adapter(adapted, tmp_path, format="peft")
    with pytest.raises(fg.SpecError, match="bias"):
        no_bias = GLORA_BIAS
        fg.rewrite(Transposed("never"), fg.Spec(no_bias, ["q"]))


GLORA_BIAS = fg.GLoRA(rank=2, path=fg.GLoRAPath("lora", "vector", "none", "none", "vector"))


@pytest.mark.parametrize("method", BANKED.values(), ids=BANKED)
def test_a_bank_over_a_product_of_the_parent(method):
    model, x = nn.Sequential(Product("never"), nn.Tanh(), Product("never")).double(), torch.randn(3, 5, 4).double()
    spec = fg.Spec(method, ["q", "out"])
    tenants = {name: perturb(graft(model, spec)) for name in "ab"}
    banked = fg.bank(model, tenants, spec=spec)
    got = banked(x, adapter_ids=fg.adapter_ids(banked, ["b", None, "a"]))
    for row, one in enumerate((tenants["b"], model, tenants["a"])):
        torch.testing.assert_close(got[row], one(x)[row])
    assert not torch.allclose(got[0], model(x)[0], atol=1e-3)


def test_onnx_of_a_product_of_the_parent(tmp_path):
    adapted = perturb(fg.rewrite(Product("never").eval(), fg.Spec(LORA, ["q", "out"])))
    example = (torch.randn(3, 4),)
    fg.export_onnx(adapted, tmp_path / "model.onnx", example, adapters="swappable")  # compares with torch itself


def test_a_product_of_the_grandparent():
    model, x = Grandparent(), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(nn.Sequential(model), fg.Spec(LORA, ["q"])))
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x), atol=1e-3)


class Careful(nn.Module):
    """Reads that are none: shape, dtype, device, and branches that are not taken."""

    def __init__(self):
        super().__init__()
        self.q, self.slow, self.names = nn.Linear(4, 4), False, ["a"]

    def forward(self, x):
        if isinstance(self.q.weight, torch.Tensor) and self.q.weight.dtype != torch.int8:
            x = x.to(self.q.weight.dtype).to(self.q.weight)
        assert self.q.weight is not None and self.q.weight.shape[0] == 4
        if self.slow:
            return F.linear(x, self.q.weight)
        y = F.linear(x, self.q.weight) if self.slow else self.q(x)
        return y + torch.zeros_like(self.q.weight).sum() + self.q.weight.new_zeros(4) + self.q.weight.size(0) - 4


def test_reading_metadata_is_not_reading():
    model, x = Careful(), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    torch.testing.assert_close(adapted(x), fg.merge(adapted)(x))
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    adapted.slow = True
    with pytest.raises(fg.AdapterError, match=LAST):
        adapted(x)


class Bound(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.call = self.q.forward

    def forward(self, x):
        return self.call(x)


def test_a_forward_bound_before_grafting_is_bound_anew():
    model, x = Bound(), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    assert not torch.allclose(adapted(x), model(x), atol=1e-3)
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(x), adapted(x))
    torch.testing.assert_close(copy.deepcopy(adapted)(x), adapted(x))
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))
    fg.remove(adapted, "default")
    torch.testing.assert_close(adapted(x), model(x))


def test_a_forward_that_hands_itself_to_a_processor_may_call_its_layers_there():
    """As diffusers' Attention: only a method that fuses the weights reads them, and the processor calls the layers."""

    class Processor:
        def __call__(self, attention, x):
            return attention.to_out(torch.tanh(attention.to_q(x)))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out, self.processor = nn.Linear(4, 6), nn.Linear(6, 4), Processor()

        def fused(self):
            return torch.cat([self.to_q.weight, self.to_q.weight])

        def forward(self, x):
            return self.processor(self, x)

    model, x = Attention(), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["all-linear"])), 1.0)
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x))
    assert {row.site for row in fg.explain(adapted).rows if row.kind == "site"} >= {"to_q"}
