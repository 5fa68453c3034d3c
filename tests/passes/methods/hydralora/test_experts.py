"""The number of experts, and the LoRA breakdown."""

from __future__ import annotations

import importlib.util
import math
import random
import sys

import pytest
import torch
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.hydralora.breakdown import lora_breakdown
from fxgraft.passes.methods.hydralora.experts import elbow, suggest_experts

torch.set_num_threads(1)

TOPICS = [
    "cell protein enzyme membrane tissue nucleus organism gene",
    "court judge lawyer verdict appeal statute plaintiff evidence",
    "goal striker penalty referee midfield league keeper stadium",
    "oven flour butter recipe dough simmer garlic spoon",
    "orbit planet comet telescope galaxy nebula rocket crater",
]


def corpus(topics, each=25, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words.split(), k=20)) for words in TOPICS[:topics] for _ in range(each)]


@pytest.mark.parametrize("topics", [2, 3, 4, 5])
def test_finds_the_topics(topics):
    assert suggest_experts(corpus(topics)) == topics


def test_the_largest_answer_can_be_given_and_is_never_passed():
    assert suggest_experts(corpus(4), max_experts=4) == 4
    assert suggest_experts(corpus(5), max_experts=3) <= 3


def test_same_seed_same_answer_and_sampling():
    texts = corpus(3, each=40)
    assert suggest_experts(texts, max_texts=60, seed=1) == suggest_experts(texts, max_texts=60, seed=1) == 3


def test_few_different_texts():
    assert suggest_experts(["a cat", "the dog", "one bird"] * 4) in (1, 2, 3)
    # different as texts, equal as features
    assert suggest_experts(["same words", "same, words", "same words!", "same words?"]) == 1


def test_elbow():
    assert elbow([10, 4, 3, 2, 1]) == 2
    assert elbow([10, 7, 4, 1, 0.5, 0]) == 4
    assert elbow([4, 3, 2, 1]) == 1  # a straight line has none
    assert elbow([4, 3.9, 3, 0]) == 1  # it lies above the chord
    assert elbow([0, 0, 0]) == 1
    assert elbow([5, 1]) == 1


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ("one text", {}, "list of texts"),
        (["a b", "c d", 3], {}, "text 2 is int"),
        (["same"] * 9, {}, "only 1 different"),
        ([], {}, "only 0 different"),
        (["!", "?", "."], {}, "no words"),
        (["aa", "bb", "cc"], {"max_experts": 1}, "max_experts=1"),
        (["aa", "bb", "cc"], {"max_experts": True}, "max_experts=True"),
        (["aa", "bb", "cc"], {"max_texts": 2}, "max_texts=2"),
    ],
)
def test_bad_input(texts, options, says):
    with pytest.raises(fg.SpecError, match=says):
        suggest_experts(texts, **options)


def test_without_scikit_learn(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(fg.FxgraftError, match="pip install scikit-learn"):
        suggest_experts(corpus(2))


# -- the breakdown -------------------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self, sites=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(sites))
        self.wide = nn.Linear(24, 40)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.wide(x)


def synthetic(task, seed):
    """An adapter as the paper finds them: A the same for all tasks, B its own for each, both with some noise."""
    torch.manual_seed(0)
    adapted = fg.rewrite(Net(), fg.Spec(fg.LoRA(4), targets=["re:.*(layers|wide).*"]))
    noise = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(100 + task)
    state = fg.adapter_state(adapted)
    fg.swap(adapted, {
        k: (t if k.endswith(".A") else torch.randn(t.shape, generator=own))
        + 0.01 * torch.randn(t.shape, generator=noise)
        for k, t in state.items()
    })  # fmt: skip
    return adapted


@pytest.fixture(scope="module")
def adapters():
    return {f"task{t}": [synthetic(t, 10 * t + s) for s in range(2)] for t in range(3)}


def test_breakdown_tells_a_from_b(adapters):
    result = lora_breakdown(adapters)
    A, B = result.agreement["A"], result.agreement["B"]
    assert A["within"].pairs == 3 * 4 and A["between"].pairs == 12 * 4  # pairs of adapters times sites
    assert A["within"].cosine > 0.95 and A["between"].cosine > 0.95 and A["between"].distance < 0.05
    assert B["within"].cosine > 0.95 and B["within"].distance < 0.05
    assert abs(B["between"].cosine) < 0.1
    assert B["between"].distance > 0.6  # random 4-dimensional spaces in 24 or 40 dimensions: 1 - 4/24, 1 - 4/40


def test_breakdown_numbers():
    """Planes in four dimensions: equal, sharing one direction, orthogonal."""
    e = torch.eye(4)
    states = [
        {"s.A": rows, "s.B": e[:, :2].clone()}
        for rows in (e[[0, 1]], e[[1, 0]] * torch.tensor([[2.0], [-3.0]]), e[[0, 2]], e[[2, 3]])
    ]
    between = [lora_breakdown({"a": states[0], "b": other}).agreement["A"]["between"] for other in states[1:]]
    assert [round(pair.distance, 5) for pair in between] == [0.0, 0.5, 1.0]
    assert [round(pair.cosine, 5) for pair in between] == [0.0, 0.5, 0.0]
    only = lora_breakdown({"a": states[0], "b": states[1]})
    assert math.isnan(only.agreement["A"]["within"].cosine) and only.agreement["A"]["within"].pairs == 0
    assert only.agreement["B"]["between"].cosine == pytest.approx(1.0)


def test_breakdown_reads_states_as_models(adapters):
    models = {task: group[0] for task, group in adapters.items()}
    states = {task: fg.adapter_state(model) for task, model in models.items()}
    renamed = {
        task: {k.removesuffix(".A").removesuffix(".B") + f".lora_{k[-1]}.weight": t for k, t in state.items()}
        for task, state in states.items()
    }
    for kind in ("within", "between"):
        for matrix in "AB":
            expected = lora_breakdown(models).agreement[matrix][kind]
            for other in (states, renamed):
                found = lora_breakdown(other).agreement[matrix][kind]
                assert found.pairs == expected.pairs
                assert found.cosine == pytest.approx(expected.cosine, abs=1e-5, nan_ok=True)
                assert found.distance == pytest.approx(expected.distance, abs=1e-5, nan_ok=True)


def test_embedding_separates_tasks_by_b_only(adapters):
    result = lora_breakdown(adapters)
    for matrix, shapes in (("A", 1), ("B", 2)):
        groups = result.embed(matrix)
        assert len(groups) == shapes
        for tasks, points in groups:
            assert points.shape == (len(tasks), 2)
    assert sorted(len(tasks) for tasks, _ in result.embed("B")) == [6, 18]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_figure(adapters, tmp_path):
    file = lora_breakdown(adapters).save_figure(tmp_path / "breakdown.png")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_figure_without_matplotlib(adapters, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(fg.FxgraftError, match="pip install matplotlib"):
        lora_breakdown(adapters).save_figure(tmp_path / "x.png")


def test_breakdown_errors(adapters):
    model = adapters["task0"][0]
    with pytest.raises(fg.AdapterError, match="given 1"):
        lora_breakdown({"a": model})
    with pytest.raises(fg.AdapterError, match="no LoRA matrices"):
        lora_breakdown({"a": {"x": torch.zeros(2)}, "b": model})
    with pytest.raises(fg.AdapterError, match="other sites"):
        lora_breakdown({"a": model, "b": {"s.A": torch.ones(2, 3), "s.B": torch.ones(3, 2)}})
