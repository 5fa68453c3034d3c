"""Kinds of torch whose weights multiply nothing an adapter could stand beside: refused by name with the reason."""

import copy

import pytest
import torch
from torch import nn

import fxgraft as fg

KINDS = {
    "lstm": (
        lambda: nn.LSTM(4, 3),
        "weight_ih_l0",
        "LSTM and cannot be adapted: its weights are multiplied at every time step",
    ),
    "gru": (lambda: nn.GRU(4, 3, bidirectional=True), "weight_hh_l0_reverse", "GRU and cannot be adapted: its weights"),
    "rnn": (lambda: nn.RNN(4, 3), "weight_hh_l0", "RNN and cannot be adapted: its weights"),
    "projected lstm": (lambda: nn.LSTM(4, 3, proj_size=2), "weight_hr_l0", "LSTM and cannot be adapted: its weights"),
    "lstm cell": (lambda: nn.LSTMCell(4, 3), "weight_ih", "LSTMCell and cannot be adapted: both of its weights"),
    "gru cell": (lambda: nn.GRUCell(4, 3), "weight_hh", "GRUCell and cannot be adapted: both of its weights"),
    "rnn cell": (lambda: nn.RNNCell(4, 3), "weight_ih", "RNNCell and cannot be adapted: both of its weights"),
    "bilinear": (lambda: nn.Bilinear(4, 3, 2), "weight", "Bilinear and cannot be adapted: its weight is 3-d"),
    "embedding bag": (
        lambda: nn.EmbeddingBag(4, 3),
        "weight",
        "EmbeddingBag and cannot be adapted: it sums or averages",
    ),
    "layer norm": (lambda: nn.LayerNorm((4, 3)), "weight", "LayerNorm and cannot be adapted: it scales"),
}


def model_with(kind):
    return nn.ModuleDict({"body": KINDS[kind][0](), "fc": nn.Linear(3, 3)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["the module", "its weight", "a glob", "an expression", "among others"])
def test_it_is_refused_by_name_with_the_reason_and_a_way_out(kind, how):
    model = model_with(kind)
    _, weight, reason = KINDS[kind]
    target = {
        "the module": "body",
        "its weight": f"body.{weight}",
        "a glob": "b*dy.weight*",
        "an expression": rf"re:body\.{weight}",
        "among others": ["fc", "body"],
    }[how]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fg.TargetError, match=rf"'body.* is a {reason}.*train=") as caught:
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), target))
    assert "Spec(train=" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_takes_the_layers_around_it(kind):
    adapted = fg.rewrite(model_with(kind), fg.Spec(fg.LoRA(rank=2)))
    assert {name.partition(".")[0] for name in fg.adapter_state(adapted)} == {"fc"}


@pytest.mark.parametrize("kind", ["lstm", "gru cell", "bilinear"])
def test_the_way_out_works(kind):
    model = model_with(kind)
    adapted = fg.rewrite(copy.deepcopy(model), fg.Spec(fg.LoRA(rank=2), "fc", train="body"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("body.fxgraft.default" in name for name in trained)
