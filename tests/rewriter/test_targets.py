"""Patterns, heads, exclusions, overrides; what is refused and what the refusal says."""

import pytest
import torch
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.targeting.output_heads import output_heads
from fxgraft.rewriter.targeting.patterns import matches
from fxgraft.rewriter.targets import resolve


def names(model, **spec):
    return [site.name for site, _ in resolve(model, fg.Spec(fg.LoRA(rank=2), **spec)).sites]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.b.query", "query", True),
        ("a.b.query", "b.query", True),
        ("a.b.subquery", "query", False),
        ("a.layers.0.q", "layers.0.*", True),
        ("a.layers.10.q", "layers.?.q", False),
        ("a.layers.0.q", "re:.*layers\\.[0-3]\\..*", True),
        ("a.layers.0.q", "re:layers", False),
    ],
)
def test_pattern_kinds(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_suffixes_globs_and_regular_expressions(bert):
    assert len(names(bert, targets=["query", "value"])) == 4
    assert names(bert, targets="layer.0.attention.self.*") == [
        f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "key", "value")
    ]
    assert names(bert, targets="re:.*layer\\.1\\..*dense") == [
        f"bert.encoder.layer.1.{n}.dense" for n in ("attention.output", "intermediate", "output")
    ]


def test_exclude_takes_blocks_and_names(bert):
    assert all(".1." in n for n in names(bert, targets=["query"], exclude=["layer.0"]))
    assert not any("key" in n for n in names(bert, targets="layer.0.attention.self.*", exclude="key"))


def test_overrides_choose_the_first_matching_pattern(bert):
    spec = fg.Spec(fg.LoRA(2), ["query", "value"], overrides={"layer.0.*": fg.LoRA(3), "query": fg.LoRA(4)})
    ranks = {s.name: m.rank for s, m in resolve(bert, spec).sites}
    assert [ranks[f"bert.encoder.layer.{i}.attention.self.{n}"] for i in (0, 1) for n in ("query", "value")] == [
        3,
        3,
        4,
        2,
    ]


def test_all_linear_leaves_the_head_out(bert, llama, gpt2, mlp):
    assert "classifier" not in names(bert) and "bert.pooler.dense" in names(bert)
    assert len(names(llama)) == 2 * 7  # the tied lm_head is out
    assert len(names(gpt2)) == 2 * 4
    assert names(mlp) == ["up", "down"]
    untied = type(llama)(type(llama.config)(**{**llama.config.to_dict(), "tie_word_embeddings": False}))
    assert "lm_head" not in names(untied)


def test_a_linear_tied_to_an_embedding_is_a_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4)
            self.mix = nn.Linear(4, 4)
            self.unembed = nn.Linear(4, 10, bias=False)
            self.unembed.weight = self.words.weight

        def forward(self, ids):
            return self.unembed(self.mix(self.words(ids)))

    assert output_heads(Tied()) == {"unembed"} and names(Tied()) == ["mix"]


def test_trained_modules_are_no_sites_of_all_linear(bert):
    resolution = resolve(bert, fg.Spec(fg.LoRA(2), train=["pooler", "classifier"]))
    assert resolution.train == ("bert.pooler", "classifier")
    assert "bert.pooler.dense" not in [s.name for s, _ in resolution.sites]


def test_parts_of_a_fused_weight(gpt2):
    sites = [s for s, _ in resolve(gpt2, fg.Spec(fg.LoRA(2), [fg.Target("c_attn", parts=3, select=(0, 2))])).sites]
    assert [s.name for s in sites[:2]] == ["transformer.h.0.attn.c_attn[0]", "transformer.h.0.attn.c_attn[2]"]
    assert {(s.in_features, s.out_features) for s in sites} == {(32, 32)} and sites[1].offset == 64


def test_parts_have_names_for_overrides(gpt2):
    target = fg.Target("c_attn", parts=3, select=(0, 2))
    spec = fg.Spec(fg.LoRA(2), [target], overrides={"re:.*c_attn\\[2\\]": fg.LoRA(3), "h.1.*": fg.LoRA(4)})
    ranks = {s.name.removeprefix("transformer.h."): m.rank for s, m in resolve(gpt2, spec).sites}
    assert ranks == {"0.attn.c_attn[0]": 2, "0.attn.c_attn[2]": 3, "1.attn.c_attn[0]": 4, "1.attn.c_attn[2]": 3}


class Asking(nn.MultiheadAttention):
    """A forward of its own, which torch.fx cannot follow."""

    def forward(self, query, key, value):
        return super().forward(query, key, value) if query.sum() > 0 else (query, None)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.norm = nn.LayerNorm(4)
        self.query = nn.Linear(4, 4)
        self.attention = Asking(4, 2)
        self.table = nn.Embedding(4, 4)

    def forward(self, x):
        return self.query(self.norm(x))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"targets": "quary"}, "'query'"),
        ({"targets": ["query", "valu"]}, "target 'valu' matches nothing"),
        ({"targets": "norm"}, "'norm' is a LayerNorm"),
        ({"targets": "t*e"}, "'table' alone, which may hold anything"),
        ({"targets": "attention.out_proj"}, "silently skipped"),
        ({"targets": "query", "exclude": "query"}, "taken out again"),
        ({"targets": "query", "exclude": "nowhere"}, "exclude 'nowhere' matches nothing"),
        ({"targets": "query", "train": "head"}, "train 'head' matches nothing"),
        ({"targets": "query", "train": "query"}, "both a target and inside a trained module"),
        ({"targets": "query", "overrides": {"key": fg.LoRA(1)}}, "override 'key' matches nothing"),
        ({"targets": [fg.Target("query", 3, (0,))]}, "3 does not divide"),
    ],
)
def test_refusals(spec, says):
    model = Odd()
    with pytest.raises(fg.TargetError) as error:
        fg.rewrite(model, fg.Spec(fg.LoRA(2), **spec))
    assert says in str(error.value)


def test_all_linear_says_what_it_leaves_out():
    with pytest.warns(UserWarning, match="attention.out_proj"):
        adapted = fg.rewrite(Odd(), fg.Spec(fg.LoRA(2)))
    assert [row.site for row in fg.explain(adapted).rows] == ["query"]


def test_a_container_points_at_what_is_inside(bert):
    with pytest.raises(fg.TargetError, match=r"inside it are .*attention\.self\.query"):
        fg.rewrite(bert, fg.Spec(fg.LoRA(2), "attention"))


def test_a_model_without_linears():
    with pytest.raises(fg.TargetError, match="all-linear"):
        fg.rewrite(nn.Sequential(nn.ReLU()), fg.Spec(fg.LoRA(2)))


def test_a_bare_linear_is_a_model():
    layer = nn.Linear(6, 4)
    adapted = fg.rewrite(layer, fg.Spec(fg.LoRA(2)))
    assert isinstance(adapted, nn.Linear) and set(fg.adapter_state(adapted)) == {"A", "B"}
    assert torch.equal(adapted(torch.ones(2, 6)), layer(torch.ones(2, 6)))
