"""Regular expressions of files: the meaning of `re`, in bounded time."""

import re

import pytest
import torch
from adapter_files import CONFIG, edit_unsealed
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.targeting import bounded_regex as patterns
from fxgraft.rewriter.targeting.bounded_regex import _cheap, full_match

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a" * 60, "up", ""]
SAME = [
    r".*\.q_proj", r"model\.layers\.(0|11)\..*proj", r"(?:[^.]+\.)*q_proj", r"^(?!.*mlp).*proj$", r"(\w+\.?)+",
    r"a{60}",
    r"(?P<x>[a-z])(?P=x)*", r"[*+{]|up", r"model\.(.*)\.(.*)\.(.*)_proj", r"(up|down|)", r"\(?up\)?", r".*?(\d+)?.*",
]  # fmt: skip
BOMBS = [
    "(a+)+$b", "(a|a)*b", "(.*)*(.*)*(.*)*x", "(a|aa)+b", "(([a-z])+.)+[A-Z]", "a?" * 40 + "a" * 60 + "b", "(.*a){25}b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SAME)
def test_the_meaning_is_that_of_re(pattern):
    for name in NAMES:
        assert bool(full_match(pattern, name)) == bool(re.fullmatch(pattern, name)), name


@pytest.mark.parametrize("pattern", BOMBS)
def test_no_bomb_is_taken_for_cheap(pattern):
    assert not _cheap(pattern)


def test_usual_expressions_stay_with_re():
    exact = "|".join(re.escape(f"model.layers.{i}.self_attn.q_proj") for i in range(300))
    for pattern in (r".*\.(q_proj|v_proj)", r"(.*\.)?(up)(\..*)?", r".*layers\.[0-9]+\.mlp\..*", exact):
        assert _cheap(pattern)


class Long(nn.Module):
    """A layer with a name long enough for an expression to explode."""

    def __init__(self):
        super().__init__()
        self.add_module("a" * 40, nn.Linear(3, 3))

    def forward(self, x):
        return self.get_submodule("a" * 40)(x)


BOMB = "(a|aa)+[^a]"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)
    patterns._matcher.cache_clear()
    yield
    patterns._matcher.cache_clear()


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("fxgraft", lambda c: c["spec"].update(targets=[f"re:{BOMB}"])),
        ("fxgraft", lambda c: c["spec"].update(exclude=[f"re:{BOMB}"])),
        ("fxgraft", lambda c: c["spec"].update(overrides={f"re:{BOMB}": c["spec"]["method"]})),
        ("peft", lambda c: c.update(target_modules=BOMB)),
        ("peft", lambda c: c.update(exclude_modules=BOMB)),
        ("peft", lambda c: c.update(rank_pattern={BOMB: 3})),
    ],
)
def test_expressions_that_explode_are_refused(impatient, tmp_path, format, change):
    fg.save_adapter(fg.rewrite(Long(), fg.Spec(fg.LoRA(2))), tmp_path, format=format)
    edit_unsealed(tmp_path, change)
    with pytest.raises(fg.CheckpointError, match="takes too long"):
        fg.load_adapter(Long(), tmp_path)
    assert (tmp_path / CONFIG).is_file()


def test_an_expression_of_the_users_own(impatient, mlp):
    adapted = fg.rewrite(mlp, fg.Spec(fg.LoRA(2), ["re:(?:[a-z]+)+"]))
    assert torch.isfinite(adapted(torch.randn(2, 7))).all()
    with pytest.raises(fg.SpecError, match="takes too long"):
        fg.rewrite(Long(), fg.Spec(fg.LoRA(2), [f"re:{BOMB}"]))
