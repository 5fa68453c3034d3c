"""What estimate_update says: a bar on a terminal, warnings, and errors that name what is wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from estimates import OPTIONS, mean_square
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.lora_sb.estimate import estimate_update


# -- errors ------------------------------------------------------------------------------------------------------
def test_no_terminal_no_bar(mlp, capfd):
    options = {**OPTIONS, "progress": True}
    estimate_update(mlp, [torch.randn(2, 7)], targets=["up"], loss=mean_square, samples=2, **options)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(mlp, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    options = {"targets": ["up"], "loss": mean_square, "samples": 2, **OPTIONS}
    estimate_update(mlp, [torch.randn(2, 7)], **{**options, "progress": True})
    assert "estimating the update" in capfd.readouterr().err
    estimate_update(mlp, [torch.randn(2, 7)], **options)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "change,error,text",
    [
        ({"batches": []}, fg.SpecError, "empty"),
        ({"batches": iter([])}, fg.SpecError, "empty"),
        ({"batches": torch.randn(2, 7)}, fg.SpecError, r"\[batch\]"),
        ({"batches": {"x": torch.randn(2, 7)}}, fg.SpecError, r"\[batch\]"),
        ({"batches": ["text"]}, fg.SpecError, "without a tensor of examples"),
        ({"loss": None}, fg.SpecError, "has no loss"),
        ({"loss": lambda y, b: y}, fg.SpecError, r"shape \(2, 3\)"),
        ({"loss": lambda y, b: 1.0}, fg.SpecError, "a float"),
        ({"loss": lambda y, b: y.sum() * float("nan")}, fg.SpecError, "loss is nan"),
        ({"loss": lambda y, b: (y * 0).sqrt().sum()}, fg.SpecError, "1 target.*NaN or infinite.*'up'"),
        ({"loss": lambda y, b: torch.tensor(1.0)}, fg.TargetError, "no gradient: 'up'"),
        ({"targets": ["upp"]}, fg.TargetError, "'up'"),
        ({"lr": 0}, fg.SpecError, "lr=0"),
        ({"warmup_ratio": 0.0}, fg.SpecError, "warmup_ratio"),
        ({"samples": 0}, fg.SpecError, "samples"),
        ({"rounds": 1.5}, fg.SpecError, "rounds"),
        ({"total_steps": -1}, fg.SpecError, "total_steps"),
    ],
)
def test_errors_say_what_is_wrong(mlp, change, error, text):
    options = {"batches": [torch.randn(2, 7)], "targets": ["up"], "loss": mean_square, "samples": 2, **OPTIONS}
    with pytest.raises(error, match=text):
        estimate_update(mlp, **{**options, **change})


def test_a_target_beside_the_loss_is_named(mlp):
    with pytest.raises(fg.TargetError, match=r"1 target weight\(s\) got no gradient: 'head'"):
        estimate_update(
            mlp, [torch.randn(2, 7)], targets=["up", "head"], samples=2, **OPTIONS,
            forward=lambda model, batch: model.up(batch), loss=mean_square,
        )  # fmt: skip


def test_all_zero_gradients_are_a_warning(mlp):
    with pytest.warns(UserWarning, match="all zero: 'up'"):
        estimate_update(mlp, [torch.zeros(2, 7)], targets=["up"], loss=lambda y, b: y.sum(), samples=2, **OPTIONS)


def test_a_quantised_weight_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.float())

    with pytest.raises(fg.TargetError, match=r"int8.*no gradient"):
        estimate_update(nn.Sequential(Packed()), [torch.randn(2, 4)], targets=["0"], loss=mean_square, **OPTIONS)


def test_no_warning_in_a_usual_run(mlp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_update(mlp, [torch.randn(2, 7)], targets=["up"], loss=mean_square, samples=2, **OPTIONS)
