"""The path search: finds a planted optimum within its budget, goes on where it stopped, and leaves the model alone."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.glora.evolution import Evolution, SearchSpace
from fxgraft.passes.methods.glora.glora import GLoRA, GLoRAPath
from fxgraft.passes.methods.glora.path import CHOICES, PATHS
from fxgraft.passes.methods.glora.search import search_paths
from fxgraft.passes.methods.glora.supernet import fix_paths, get_paths, set_paths

optuna = pytest.importorskip("optuna")
torch.set_num_threads(1)
QUICK = {"progress": False, "generations": 4, "population": 10, "top": 3, "mutations": 5, "crossovers": 3}
SIZE, RANK = 6, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
        self.classifier = nn.Linear(SIZE, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    spec = fg.Spec(GLoRA(rank=RANK), targets=["all-linear"], train=["classifier"])
    adapted = fg.rewrite(Net(), spec)
    for value in fg.adapter_state(adapted).values():
        value.normal_()
    return adapted


def agreement(target: GLoRAPath):
    """A score whose only optimum is the target at every site."""
    return lambda model: sum(getattr(p, t) == getattr(target, t) for p in get_paths(model).values() for t in CHOICES)


def cost(paths) -> int:
    return sum(path.parameters(SIZE, SIZE, RANK) for path in paths.values())


def test_finds_a_planted_optimum(supernet):
    target = GLoRAPath("vector", "lora", "none", "constant", "vector")
    best = search_paths(supernet, agreement(target), progress=False, seed=1, p=0.2)
    assert best.paths == {"layers.0": target, "layers.1": target} and best.score == 10
    assert best.params == cost(best.paths)
    assert len(best.history) == 20 and best.history[0].evaluations == 50
    so_far = [g.best_so_far for g in best.history]
    assert so_far == sorted(so_far) and so_far[-1] == 10 > so_far[0]
    # better than as many random paths: in one of 432^2, 1000 draws rarely hit it
    assert best.history[-1].mean > best.history[0].mean + 2


def test_scores_what_the_model_computes(supernet):
    x = torch.randn(20, SIZE)
    wanted = {"layers.0": PATHS[40], "layers.1": PATHS[400]}
    set_paths(supernet, wanted)
    y = supernet.eval()(x).detach()
    best = search_paths(supernet, lambda model: -(model(x) - y).norm().item(), **{**QUICK, "generations": 12})
    set_paths(supernet, best.paths)
    with torch.no_grad():  # as the search scores: where gradients flow the operator may sum in another order
        assert best.score == pytest.approx(-(supernet(x) - y).norm().item(), rel=1e-5)
    torch.testing.assert_close(fix_paths(supernet, best.paths)(x), supernet(x), rtol=1e-5, atol=1e-4)  # values near 40


@pytest.mark.parametrize("low, high", [(0, 3), (20, 24), (60, 90), (130, None), (7, 7), (0, 0)])
def test_every_candidate_is_within_the_budget(supernet, low, high):
    seen = []

    def evaluate(model):
        seen.append(cost(get_paths(model)))
        return random.Random(str(get_paths(model))).random()

    best = search_paths(supernet, evaluate, min_params=low, max_params=high, **QUICK)
    assert seen and min(seen) >= low and max(seen) <= (high if high is not None else 10**9)
    assert best.params == cost(best.paths)
    fixed = fix_paths(supernet, best.paths)
    head = sum(p.numel() for p in Net().classifier.parameters())
    assert sum(p.numel() for p in fixed.parameters() if p.requires_grad) == best.params + head


def test_a_budget_nobody_can_meet_is_an_error_before_anything_runs(supernet):
    def never(model):
        raise AssertionError("evaluated")

    most = cost({"layers.0": PATHS[0], "layers.1": PATHS[0]})
    for low, high in ((most + 1, None), (most - 1, most - 1)):  # the second is a gap between two reachable sums
        with pytest.raises(fg.AdapterError, match="no choice of paths"):
            search_paths(supernet, never, min_params=low, max_params=high, **QUICK)
    assert SearchSpace([[p.parameters(SIZE, SIZE, RANK) for p in PATHS]] * 2, most, most).low == most
    for wrong in ({"population": 0}, {"mutations": 9}, {"p": 0.0}, {"min_params": 9, "max_params": 8}, {"top": 0}):
        with pytest.raises(fg.AdapterError, match="search_paths"):
            search_paths(supernet, never, **{**QUICK, **wrong})
    plain = fg.rewrite(Net(), fg.Spec(fg.LoRA(rank=2), targets=["all-linear"]))
    with pytest.raises(fg.AdapterError, match="supernet"):
        search_paths(plain, never, **QUICK)


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"population": 10}, (5, 5)), ({"population": 50}, (25, 25)), ({"population": 1}, (0, 0)),
        ({"population": 10, "mutations": 8}, (8, 2)), ({"population": 10, "crossovers": 3}, (5, 3)),
    ],
)  # fmt: skip
def test_the_shares_of_a_generation_follow_from_its_size(supernet, options, shares):
    from fxgraft.passes.methods.glora.search import _shares

    assert _shares(options["population"], options.get("mutations"), options.get("crossovers")) == shares
    best = search_paths(supernet, lambda model: -cost(get_paths(model)), generations=2, progress=False, **options)
    assert best.params == cost(best.paths)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_goes_on_where_it_stopped_and_finds_the_same(supernet, tmp_path, kind):
    evaluate = agreement(GLoRAPath("none", "lora", "vector", "constant", "none"))
    whole = search_paths(supernet, evaluate, max_params=100, seed=5, **QUICK)
    if kind == "sqlite":
        storage = f"sqlite:///{tmp_path / 'search.db'}"
    else:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "search.log"))
        storage = optuna.storages.JournalStorage(backend)
    calls = []

    def stopping(model):
        calls.append(1)
        if len(calls) == 17:
            raise Stop
        return evaluate(model)

    with pytest.raises(Stop):
        search_paths(supernet, stopping, max_params=100, seed=5, storage=storage, **QUICK)
    resumed = search_paths(supernet, stopping, max_params=100, seed=5, storage=storage, **QUICK)
    assert resumed == whole
    assert len(calls) == sum(g.evaluations for g in whole.history) + 1  # nothing was scored twice but the stopped one
    with pytest.raises(fg.AdapterError, match=r"another search.*seed"):
        search_paths(supernet, evaluate, max_params=100, seed=6, storage=storage, **QUICK)


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch, test_search as t
net = t.Net()
supernet = t.fg.rewrite(net, t.fg.Spec(t.GLoRA(rank=t.RANK), targets=["all-linear"], train=["classifier"]))
calls = []
def evaluate(model):
    calls.append(1)
    t.torch.manual_seed(0)
    import time; time.sleep(0.05)
    return t.agreement(t.PATHS[30])(model)
best = t.search_paths(supernet, evaluate, storage={storage!r}, seed=2, **t.QUICK)
print(len(calls), best.score, sum(g.evaluations for g in best.history))
"""


def test_two_processes_share_one_search(tmp_path):
    from pathlib import Path

    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    optuna.create_study(storage=storage, study_name="other")  # the tables exist before both want to make them
    code = WORKER.format(tests=str(Path(__file__).parent), storage=storage)
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [worker.communicate(timeout=300)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    calls = [int(result[0]) for result in results]
    assert 38 <= sum(calls) <= 41 and results[0][1:] == results[1][1:]


def test_seeds_decide(supernet):
    evaluate = agreement(PATHS[99])
    one, again, other = (search_paths(supernet, evaluate, seed=seed, **QUICK) for seed in (3, 3, 4))
    assert one == again and one.history != other.history


def test_the_supernet_gets_its_paths_and_modes_back(supernet):
    before = {"layers.0": PATHS[5], "layers.1": PATHS[6]}
    set_paths(supernet, before)
    supernet.train()
    supernet.layers[1].eval()
    modes = []

    def evaluate(model):
        modes.append(model.training)
        assert not torch.is_grad_enabled()
        return 0.0

    search_paths(supernet, evaluate, **QUICK)
    assert not any(modes) and get_paths(supernet) == before
    assert supernet.training and supernet.layers[0].training and not supernet.layers[1].training


def test_bad_scores_are_errors(supernet):
    with pytest.raises(fg.AdapterError, match="nan"):
        search_paths(supernet, lambda model: float("nan"), **QUICK)
    with pytest.raises(fg.AdapterError, match="training mode"):
        search_paths(supernet, lambda model: float(model.train().training), **QUICK)


def test_optuna_is_asked_for_by_name(supernet, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(fg.FxgraftError, match=r"fxgraft\[search\]"):
        search_paths(supernet, lambda model: 0.0, **QUICK)


def test_mutation_and_crossover_change_what_they_say():
    costs = [[p.parameters(SIZE, SIZE, RANK) for p in PATHS]] * 400
    space, rng = SearchSpace(costs, 0, None), np.random.default_rng(0)
    one, other = space.random(rng), space.random(rng)
    changed = np.mean([getattr(PATHS[a], t) != getattr(PATHS[b], t)
                       for a, b in zip(one, space.mutated(one, 0.2, rng), strict=True) for t in CHOICES])  # fmt: skip
    expected = 0.2 * (2 * 3 / 4 + 3 * 2 / 3) / 5  # a redraw may draw the same choice
    assert abs(changed - expected) < 0.04
    first = second = 0
    for a, b, c in zip(one, other, space.crossed(one, other, rng), strict=True):
        for t in CHOICES:
            values = [getattr(PATHS[i], t) for i in (a, b, c)]
            assert values[2] in values[:2]
            first += values[0] != values[1] and values[2] == values[0]
            second += values[0] != values[1] and values[2] == values[1]
    assert abs(first / (first + second) - 0.5) < 0.06
    evolution = Evolution(space, 10, 3, 5, 3, 0.2, 0)
    scored = [(space.random(rng), float(i)) for i in range(10)]
    child = evolution.propose(10, scored)
    assert any(np.mean(np.equal(child, parent)) > 0.2 for parent, _ in scored[-3:])


def test_fix_paths_checks_and_keeps_the_rest(supernet):
    paths = {"layers.0": PATHS[7], "layers.1": PATHS[300]}
    with pytest.raises(fg.AdapterError, match=r"no path for 1 site.*layers\.1"):
        fix_paths(supernet, {"layers.0": PATHS[7]})
    with pytest.raises(fg.AdapterError, match=r"layers\.9.*close"):
        fix_paths(supernet, {**paths, "layers.9": PATHS[7]})
    with pytest.raises(fg.AdapterError, match=r"a path for every site"):
        fix_paths(supernet, PATHS[7])
    with pytest.raises(fg.SpecError, match="GLoRAPath"):
        fix_paths(supernet, {**paths, "layers.1": "lora"})
    with pytest.raises(fg.AdapterError, match="supernet"):
        fix_paths(fix_paths(supernet, paths), paths)
    before = {k: v.clone() for k, v in fg.adapter_state(supernet).items()}
    fixed = fix_paths(supernet, {site: {t: getattr(p, t) for t in CHOICES} for site, p in paths.items()})
    after = fg.adapter_state(fixed)
    assert torch.equal(after["classifier.weight"], before["classifier.weight"])
    for value in after.values():
        value.zero_()
    assert all(torch.equal(v, before[k]) for k, v in fg.adapter_state(supernet).items())
    assert fg.active(fixed) == ["default"] and fixed.training == supernet.training
