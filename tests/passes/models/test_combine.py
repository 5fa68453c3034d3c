"""`fg.combine`: against PEFT's `add_weighted_adapter`, against the sums in float64, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from typing import get_args

import pytest
import torch
from methods import LOW_RANK, graft
from small_models import noisy
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.low_rank_factors import linear_factors
from fxgraft.passes.models.combine import Combination

METHODS = get_args(Combination)
SITES = ["up", "down"]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(10, 14), nn.Linear(14, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).relu()))


def base() -> MLP:
    torch.manual_seed(0)
    return MLP()


def adapted(methods: dict[str, fg.LoRA], model: nn.Module | None = None, **spec) -> nn.Module:  # type: ignore[no-untyped-def]
    model = model or base()
    for seed, (name, method) in enumerate(methods.items()):
        model = noisy(graft(model, fg.Spec(method, **{"targets": SITES, **spec}), name=name), name, seed)
    return model


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {site: B.double() @ A.double() for site, (A, B) in linear_factors(model, name).items()}


def options(method: str) -> dict[str, float]:
    return {} if method in ("cat", "linear", "svd") else {"density": 0.6}


X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))


# -- against PEFT --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def both(tmp_path_factory):  # type: ignore[no-untyped-def]
    """The same three adapters in PEFT and here; one of them is on fewer sites."""
    peft = pytest.importorskip("peft")
    configs = {
        "a": peft.LoraConfig(r=4, lora_alpha=8, target_modules=SITES),
        "b": peft.LoraConfig(r=4, lora_alpha=4, target_modules=SITES, use_rslora=True),
        "c": peft.LoraConfig(r=4, lora_alpha=2, target_modules=["up"]),
    }
    theirs = peft.get_peft_model(base(), configs["a"], adapter_name="a")
    for name in ("b", "c"):
        theirs.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, parameter in theirs.named_parameters():
            if "lora_" in n:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("peft")
    theirs.save_pretrained(folder)
    ours: nn.Module = base()
    for name in configs:
        ours = fg.load_adapter(ours, folder / name, name=name)
    return theirs, ours


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.4}, {"a": 1.0, "b": 1.0, "c": 0.5}, {"a": 0.9, "b": -0.3}])
@pytest.mark.parametrize(
    ("method", "sign"), [(m, "total") for m in METHODS] + [(m, "frequency") for m in METHODS if "ties" in m]
)
def test_as_peft(both, method: str, weights: dict[str, float], sign: str) -> None:  # type: ignore[no-untyped-def]
    theirs, ours = copy.deepcopy(both[0]), both[1]
    votes = "ties" in method
    make = theirs.base_model.inject_adapter
    # PEFT draws the values that it overwrites first: what dare draws shall start from the seed
    theirs.base_model.inject_adapter = lambda *given: (make(*given), torch.manual_seed(11))
    theirs.add_weighted_adapter(
        [*weights], [*weights.values()], "new", combination_type=method, majority_sign_method=sign, **options(method)
    )
    mine = deltas(fg.combine(ours, weights, method, majority_sign=sign, seed=11, name="new", **options(method)), "new")
    far = 0.0
    for site in SITES:
        layer = theirs.base_model.model.get_submodule(site)
        want = layer.get_delta_weight("new").detach().double()
        assert mine[site].abs().max() > 1e-2
        far = max(far, float((mine[site] - want).abs().max()))
    if votes and min(weights.values()) < 0:
        assert far > 1e-3  # PEFT lets an adapter that is subtracted vote as if it were added
    else:
        assert far < 1e-5


# -- by itself -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_negative_weight_is_the_negated_adapter(method: str) -> None:
    model = adapted({"a": fg.LoRA(rank=3), "b": fg.LoRA(rank=3, alpha=5)})
    negated = copy.deepcopy(model)
    fg.swap(negated, {k: -v if k.endswith(".A") else v for k, v in fg.adapter_state(model, "b").items()}, "b")
    minus = deltas(fg.combine(model, {"a": 0.8, "b": -0.5}, method, **options(method)), "combined")
    plus = deltas(fg.combine(negated, ["a", "b"], method, weights=[0.8, 0.5], **options(method)), "combined")
    for site in SITES:
        torch.testing.assert_close(minus[site], plus[site], rtol=1e-5, atol=1e-6)


def test_cat_is_the_sum_of_any_low_rank_methods() -> None:
    model = adapted(LOW_RANK)
    weights = dict(zip(LOW_RANK, itertools.cycle((0.5, -1.5, 2.0, 0.25))))
    combined = fg.combine(model, weights)
    assert fg.active(combined) == ["combined"] and fg.active(model) == [list(LOW_RANK)[-1]]
    sums = {s: sum(w * deltas(model, n)[s] for n, w in weights.items()) for s in SITES}
    for site in SITES:
        torch.testing.assert_close(deltas(combined, "combined")[site], sums[site], rtol=1e-5, atol=1e-5)
        assert combined.get_submodule(site).fxgraft.combined.A.shape[0] == 10  # more ranks, and a weight has 10
    fg.set_active(model, weights)
    torch.testing.assert_close(combined(X), model(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fg.merge(model)(X), model(X), rtol=1e-4, atol=1e-5)
    best = fg.combine(model, weights, "svd", rank=3)
    for site in SITES:
        U, S, Vh = torch.linalg.svd(sums[site])
        want = U[:, :3] * S[:3] @ Vh[:3]
        torch.testing.assert_close(deltas(best, "combined")[site], want, rtol=1e-4, atol=1e-5)


def test_the_result_is_an_adapter_like_others(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = adapted({"a": fg.LoRA(rank=2), "b": fg.LoRA(rank=3)}, overrides={"down": fg.LoRA(rank=4, alpha=2)})
    combined = fg.combine(model, ["a", "b"], weights=[0.5, 2], name="mix")
    fg.save_adapter(combined, tmp_path, "mix")
    again = fg.load_adapter(base(), tmp_path, "mix")
    assert torch.equal(again(X), combined(X))
    assert {p.shape[0] for n, p in again.named_parameters() if n.endswith(".A")} == {5, 8}
    fg.remove(combined, "mix")
    fg.set_active(combined, ["a"])
    fg.set_active(model, ["a"])
    assert torch.equal(combined(X), model(X))


def test_parts_of_a_fused_weight() -> None:
    targets = {"a": fg.Target("up", 2, (0,)), "b": fg.Target("up", 2, (0, 1))}
    model: nn.Module = base()
    for seed, (name, target) in enumerate(targets.items()):
        model = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=[target, "down"]), name=name), name, seed)
    weights = {"a": 0.5, "b": -2.0}
    combined = fg.combine(model, weights)
    fg.set_active(model, weights)
    torch.testing.assert_close(combined(X), model(X), rtol=1e-4, atol=1e-5)
    whole = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=SITES), name="c"), "c", 5)
    with pytest.raises(fg.MergeError, match="cut one weight differently"):
        fg.combine(whole, ["a", "c"])


def test_a_trained_head_comes_along() -> None:
    model = noisy(fg.rewrite(base(), fg.Spec(fg.LoRA(rank=2), targets=SITES, train=["head"]), name="a"), "a", 1)
    model = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["up"]), name="b"), "b", 2)
    for weights in ({"a": 1.0, "b": 0.5}, {"b": -1.0, "a": 0.25}):
        combined = fg.combine(model, weights)
        fg.set_active(model, weights)
        torch.testing.assert_close(combined(X), model(X), rtol=1e-4, atol=1e-5)
    model = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["up"], train=["head"]), name="c"), "c", 3)
    with pytest.raises(fg.AdapterError, match="both bring their own trained"):
        fg.combine(model, ["a", "c"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"adapters": []}, "name the adapters"),
        ({"adapters": "a"}, "give a list"),
        ({"adapters": ["a", "z"]}, "no adapter 'z'"),
        ({"adapters": {"a": 0.0}}, "other than 0"),
        ({"adapters": ["a"], "weights": [1, 2]}, "2 weights for 1"),
        ({"adapters": ["a", "b"], "method": "sum"}, "allowed are 'cat'"),
        ({"adapters": ["a", "b"], "method": "ties"}, "needs density"),
        ({"adapters": ["a", "b"], "method": "ties", "density": 0}, "above 0"),
        ({"adapters": ["a", "b"], "method": "ties", "density": "1"}, "above 0"),
        ({"adapters": ["a", "b"], "method": "ties_svd", "density": 0.001}, "keeps none"),
        ({"adapters": ["a", "b"], "method": "cat", "density": 0.5}, "takes no density"),
        ({"adapters": ["a", "b"], "method": "cat", "rank": 2}, "svd methods"),
        ({"adapters": ["a", "b"], "method": "svd", "rank": 0}, "from 1 up"),
        ({"adapters": ["a", "b"], "method": "linear"}, r"ranks are \[2, 3\]"),
        ({"adapters": ["a", "b"], "method": "dare_ties", "density": 0.5}, r"ranks are \[2, 3\]"),
        ({"adapters": ["a", "b"], "majority_sign": "loud"}, "'total', 'frequency'"),
        ({"adapters": ["a", "b"], "seed": "x"}, "whole number"),
        ({"adapters": ["a", "b"], "name": "a"}, "'a'"),
        ({"adapters": ["a", "hydra"]}, "no low-rank factors"),
        ({"adapters": ["a", "glora"]}, "no low-rank factors"),
        ({"adapters": ["a", "nan"]}, "NaN or infinite"),
    ],
)
def test_what_is_refused(arguments, match: str) -> None:  # type: ignore[no-untyped-def]
    path = fg.GLoRAPath("vector", "none", "none", "none", "none")
    model = adapted({"a": fg.LoRA(rank=2), "b": fg.LoRA(rank=3), "hydra": fg.HydraLoRA(rank=2),
                     "glora": fg.GLoRA(rank=2, path=path), "nan": fg.LoRA(rank=2)})  # fmt: skip
    fg.adapter_state(model, "nan")["up.A"][0, 0] = float("nan")
    fg.set_active(model, ["a"])
    want = model(X)
    with pytest.raises(fg.FxgraftError, match=match):
        fg.combine(model, **arguments)
    assert torch.equal(model(X), want) and fg.active(model) == ["a"]
