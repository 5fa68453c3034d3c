"""Heads are found by what a model declares and by its dataflow; `explain` names what all-linear left out, and why."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MLP
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.targeting.output_heads import output_heads


class Attention(nn.Module):
    """A layer called `score` in the middle, and one called `head` at the end."""

    def __init__(self):
        super().__init__()
        self.score, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.out(torch.softmax(self.score(x), -1))


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return torch.log_softmax(self.head(self.blocks(x)), -1)


class Counted(nn.Module):
    """A head of no usual name, in a Sequential, of a model that says how many classes it has."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.decide = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.Dropout(0.1))

    def forward(self, x):
        return self.decide(torch.relu(self.body(x)))


class Declared(nn.Module):
    """As timm's models have it."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def get_classifier(self):
        return self.last

    def forward(self, x):
        return self.last(self.body(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.mix, self.aside = nn.GRU(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, 2)

    def forward(self, x):
        return self.classifier(self.aside(self.mix(self.rnn(x)[0])))


def sites(model, **options):
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "all-linear", **options))
    explained = fg.explain(adapted)
    return {row.site for row in explained.rows if row.kind == "site"}, explained


def test_a_name_of_a_head_in_the_middle_of_a_model_is_no_head():
    assert output_heads(Scored()) == {"head"}
    assert sites(Scored())[0] == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("score", "out")}


def test_the_last_product_of_a_model_that_counts_its_classes():
    assert output_heads(Counted()) == {"decide.1"} and sites(Counted())[0] == {"body"}


def test_a_head_that_a_model_declares():
    taken, explained = sites(Declared())
    assert taken == {"body"} and explained.left == {"default": {"last": "the output head: get_classifier() names it"}}


def test_explain_names_what_was_left_out_and_why():
    taken, explained = sites(Recurrent(), train=["aside"], exclude=[])
    left = explained.left["default"]
    assert taken == {"mix"} and left["aside"] == "trained in full" and "by its name" in left["classifier"]
    assert "recurrent kernel" in left["rnn"]
    text = str(explained)
    assert "'default' leaves out aside: trained in full" in text.replace("'aside'", "aside")
    assert sites(Recurrent(), exclude=["aside"])[1].left["default"]["aside"] == "excluded"
    assert not fg.explain(fg.rewrite(Recurrent(), fg.Spec(fg.LoRA(2), ["mix"]))).left


@pytest.mark.parametrize("sites", [["blocks.0.out", "blocks.1.out"], ["blocks.0.out", "blocks.1.out", "head"]], ids=len)
def test_a_folder_that_was_saved_under_another_rule_opens(sites, tmp_path):
    """`all-linear` of a folder means the sites that it meant when the folder was written."""
    adapted = fg.rewrite(Scored(), fg.Spec(fg.LoRA(2), [f"re:{re.escape(site)}" for site in sites]))
    fg.save_adapter(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["spec"]["targets"] = ["all-linear"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    opened = fg.load_adapter(Scored(), tmp_path)
    assert {row.site for row in fg.explain(opened).rows} == set(sites)


def test_tracing_leaves_other_adapters_as_they_are():
    model = fg.rewrite(MLP(), fg.Spec(fg.LoRA(rank=2), ["up", "down"], train=["head"]), name="a")
    twice = fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["up", "down"], train=["head"]), name="b")
    kept = [module for root in (model, twice) for module in root.modules() if "Linear" in type(module).__name__]
    assert kept and all(type(module).__getattribute__ is nn.Module.__getattribute__ for module in kept)
