"""Layers whose weight is computed at every call: refused by name, left out with a warning by `all-linear`."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxgraft as fg
from fxgraft.rewriter.state import record_of


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def by_hand(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


KINDS = {
    "weight_norm": (parametrizations.weight_norm, "WeightNorm", "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "SpectralNorm", "remove_parametrizations"),
    "parametrize": (by_hand, "Doubled", "remove_parametrizations"),
    "old weight_norm": (nn.utils.weight_norm, "WeightNorm", "remove_weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "SpectralNorm", "remove_spectral_norm"),
}


def model_of(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.ModuleDict({"normed": KINDS[kind][0](nn.Linear(4, 4)), "fc": nn.Linear(4, 4)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["normed", "re:normed"])
def test_it_is_refused_by_name(kind, target):
    _, name, undo = KINDS[kind]
    with pytest.raises(fg.TargetError, match=rf"'normed' cannot be adapted: its weight is computed .*{name}.*{undo}"):
        fg.rewrite(model_of(kind), fg.Spec(fg.LoRA(rank=2), target))


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_it_out_and_says_so(kind):
    model = model_of(kind)
    with pytest.warns(UserWarning, match=r"left out 1 layer\(s\): normed \(its weight is computed anew"):
        adapted = fg.rewrite(model, fg.Spec(fg.LoRA(rank=2)))
    assert [site.name for site in record_of(adapted, "default").sites] == ["fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), exclude="normed"))


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_the_way_out_works(kind):
    layer, x = model_of(kind)["normed"], torch.randn(3, 4)
    before = layer(x)
    if kind == "weight_norm":
        parametrize.remove_parametrizations(layer, "weight")
    else:
        nn.utils.remove_weight_norm(layer)
    adapted = fg.rewrite(nn.Sequential(layer), fg.Spec(fg.LoRA(rank=2), "0"))
    torch.testing.assert_close(adapted(x), before)
