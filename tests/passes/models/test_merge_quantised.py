"""Merging into a quantised base: plain layers of a stated dtype, or its own format again with the loss said."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS, graft
from quantised_layers import FEATURES, HIDDEN, LAYERS, mlp
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.quantised.quantised import quantised

pytestmark = pytest.mark.filterwarnings("ignore:.*dequantised at every call:UserWarning")
X = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))
AGAIN = [kind for kind in LAYERS if kind not in ("gptq", "awq")]


def adapted(kind, method=fg.LoRA(2), targets=("up", "down")):  # noqa: B008 (frozen)
    return perturb(graft(mlp(kind), fg.Spec(method, list(targets))))


def near(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_merged_layer_becomes_has_to_be_said(kind):
    model = adapted(kind)
    with pytest.raises(fg.MergeError, match=r"'up' is stored as .*merge\(dtype=torch.float32\).*requantise=True"):
        fg.merge(model)
    with pytest.raises(fg.MergeError, match=r"choose one"):
        fg.merge(model, dtype=torch.float32, requantise=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_into_plain_layers(kind):
    model = adapted(kind)
    before = model(X)
    plain = fg.merge(model, dtype=torch.float32)
    assert type(plain.up) is type(plain.down) is nn.Linear
    assert plain.up.weight.dtype == torch.float32
    near(plain(X), before)
    with fg.disabled(model):
        assert not torch.allclose(plain(X), model(X))
    assert torch.equal(model(X), before)  # it is as it was
    part = fg.merge(adapted(kind, targets=["down"]), dtype=torch.float32)
    assert quantised(part.up) is not None
    assert type(part.down) is nn.Linear


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.unmergeable is None and n not in ("supernet",)])
def test_every_method_merges(name):
    method = fg.PRoLoRA(rank=4, unshared=1, a_chunks=2, b_chunks=2) if name == "prolora" else METHODS[name]
    model = adapted("nf4", method)
    near(fg.merge(model, dtype=torch.float64).double()(X.double()), model(X).double(), 2e-5)


@pytest.mark.parametrize("kind", AGAIN)
def test_merged_into_the_base_s_format_with_the_loss_said(kind):
    model = adapted(kind)
    before, layer = model(X), model.up
    with pytest.warns(UserWarning, match=r"moves the merged weights of 2 layer\(s\) by \d+\.\d% on average"):
        again = fg.merge(model, requantise=True)
    assert quantised(again.up) is quantised(layer)
    assert torch.equal(model(X), before)
    assert again.up.weight.dtype == model.up.weight.dtype if kind != "hqq" else again.up.W_q.dtype == layer.W_q.dtype
    wanted = fg.merge(model, dtype=torch.float32)
    kept = quantised(again.up).weight(again.up)
    error = (kept - wanted.up.weight).norm() / wanted.up.weight.norm()
    assert 0 < error < 0.15
    near(again(X), wanted(X), 0.3)
    with fg.disabled(model):
        assert not torch.equal(again(X), model(X))


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_calibrated_formats_are_not_quantised_again(kind):
    with pytest.raises(fg.MergeError, match=r"cannot be quantised again.*dtype"):
        fg.merge(adapted(kind), requantise=True)


def test_a_plain_base_takes_neither():
    model = fg.rewrite(nn.Sequential(nn.Linear(4, 4)), fg.Spec(fg.LoRA(1), ["0"]))
    for options in ({"dtype": torch.float32}, {"requantise": True}):
        with pytest.raises(fg.MergeError, match=r"none of the merged layers is quantised"):
            fg.merge(model, **options)
    with pytest.raises(fg.MergeError, match=r"dequantised to torch.float32"):
        fg.merge(adapted("gptq"), dtype=torch.int8)


def test_an_overflow_is_an_error():
    model = adapted("gptq")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("B")).mul_(1e9)
    with pytest.raises(fg.MergeError, match=r"'up': the merged weight overflows torch.float16"):
        fg.merge(model, dtype=torch.float16)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dequantised_model_keeps_its_adapters(kind, tmp_path):
    model = adapted(kind)
    plain = fg.dequantise(model)
    near(plain(X), model(X))
    assert isinstance(plain.up, nn.Linear)
    assert quantised(plain.up) is None
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    plain(X).sum().backward()
    near(fg.merge(plain)(X), model(X))
    fg.save_adapter(plain, tmp_path)
    assert torch.equal(fg.load_adapter(mlp(kind), tmp_path)(X), model(X))
    fg.remove(plain, "default")
    assert type(plain.up) is nn.Linear
    with pytest.raises(fg.MergeError, match=r"none of its layers is quantised"):
        fg.dequantise(plain)


def test_an_estimate_is_made_on_the_dequantised_model():
    model = mlp("nf4")
    options = {"targets": ["up", "down"], "loss": lambda y, batch: y.square().mean(), "samples": 3, "lr": 1e-3}
    with pytest.raises(fg.TargetError, match=r"'up'.*fg.dequantise"):
        fg.estimate_update(model, [X], total_steps=10, warmup_ratio=0.1, **options)
    update = fg.estimate_update(fg.dequantise(model), [X], total_steps=10, warmup_ratio=0.1, **options)
    result = fg.rewrite(model, fg.Spec(fg.LoRASB(rank=2), ["up", "down"]), update=update)
    assert not torch.allclose(result(X), model(X))
    assert update.shapes["up"] == (HIDDEN, FEATURES)


@pytest.mark.parametrize("options", [{"mapping_type": "ASYMMETRIC"}, {"act_pre_scale": torch.linspace(1, 2, FEATURES)}])
def test_zero_points_and_input_scales_of_torchao_are_part_of_the_weight(options):
    ao = pytest.importorskip("torchao.quantization")
    model = mlp("torchao int8")
    options = {
        key: getattr(ao.MappingType, value) if isinstance(value, str) else value for key, value in options.items()
    }
    weight = torch.randn(HIDDEN, FEATURES, generator=torch.Generator().manual_seed(2)) + 0.5
    model.up.weight = nn.Parameter(type(model.up.weight).from_hp(weight, ao.PerRow(), **options), requires_grad=False)
    grafted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["up"]))
    with torch.no_grad():
        next(p for n, p in grafted.named_parameters() if n.endswith("B")).normal_()
    near(fg.merge(grafted, dtype=torch.float32)(X), grafted(X))
    with pytest.raises(fg.MergeError, match="Int8Tensor with settings of its own"):
        fg.merge(grafted, requantise=True)
