"""Many adapters in one model: every sample gets its own, slot 0 the base, tenants come and go without recompiling."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from methods import BANKED, METHODS, graft
from small_models import MLP, perturb
from torch._dynamo.utils import counters

import fxgraft as fg
from fxgraft.rewriter.forms import forms_of

#: a method of every form that a bank has
FORMS = list({forms_of(method)[0]: name for name, method in reversed(BANKED.items())}.values())


def adapters(model, spec, count=3):
    """Adapted models with different values, each in eval mode."""
    return {f"t{i}": perturb(graft(model, spec), 0.3).eval() for i in range(count)}


def rows(model_by_name, names, model, x):
    """What a bank must give: every row from its own adapted model, alone."""
    outputs = {name: (model if name is None else model_by_name[name])(x) for name in set(names)}
    return torch.stack([outputs[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("method", BANKED.values(), ids=BANKED)
def test_every_sample_gets_its_own_adapter(mlp, method):
    own = adapters(mlp, fg.Spec(method, targets=["up", "down"]))
    banked = fg.bank(
        graft(mlp, fg.Spec(method, targets=["up", "down"])), {n: fg.adapter_state(m) for n, m in own.items()}
    )
    names = ["t1", None, "t0", "t2", "t1"]
    for shape in ((5, 7), (5, 4, 7)):
        x = torch.randn(*shape)
        with torch.no_grad():
            got = banked(x, adapter_ids=fg.adapter_ids(banked, names))
            want = rows(own, names, mlp, x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert (got[0] - got[1]).abs().max() > 1e-3
        assert torch.equal(banked(x), mlp(x))
        assert torch.equal(banked(x, adapter_ids=torch.zeros(5, dtype=torch.long)), mlp(x))


def test_trained_heads_come_along(mlp):
    spec = fg.Spec(fg.LoRA(rank=2), targets=["up"], train=["head"])
    own = adapters(mlp, spec)
    banked = fg.bank(mlp, own)
    x, names = torch.randn(4, 7), ["t0", "t1", None, "t2"]
    with torch.no_grad():
        got = banked(x, adapter_ids=fg.adapter_ids(banked, names))
        torch.testing.assert_close(got, rows(own, names, mlp, x), rtol=1e-5, atol=1e-6)


def test_other_ranks_are_padded(mlp):
    own = {
        "small": perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=1), targets=["up"]))).eval(),
        "large": perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=4), targets=["up", "down"]))).eval(),
    }
    banked = fg.bank(mlp, own)
    x, names = torch.randn(3, 7), ["small", "large", None]
    with torch.no_grad():
        got = banked(x, adapter_ids=fg.adapter_ids(banked, names))
        torch.testing.assert_close(got, rows(own, names, mlp, x), rtol=1e-5, atol=1e-6)
    spec = fg.Spec(fg.LoRA(rank=4, alpha=4), targets=["up"])
    lone = perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=2, alpha=4), targets=["up"]))).eval()
    by_state = fg.bank(mlp, {"a": fg.adapter_state(lone)}, spec=spec, rank=4)
    with torch.no_grad():
        got = by_state(x, adapter_ids=torch.ones(3, dtype=torch.long))
        torch.testing.assert_close(got, lone(x), rtol=1e-5, atol=1e-6)


def test_unilora_tenants_are_a_matrix(mlp):
    method = fg.UniLoRA(rank=2, vector_length=30)
    own = adapters(mlp, fg.Spec(method, targets=["up", "down"]))
    banked, expanded = fg.bank(mlp, own, capacity=7), fg.bank(mlp, own, expand=True)
    state = banked.state_dict()
    assert state["fxgraft_shared.bank.theta"].shape == (8, 30)
    assert not any("index" in key for key in state)
    x, ids = torch.randn(3, 7), fg.adapter_ids(banked, ["t2", "t0", None])
    torch.testing.assert_close(banked(x, adapter_ids=ids), expanded(x, adapter_ids=ids), rtol=1e-5, atol=1e-6)
    other = fg.rewrite(mlp, fg.Spec(fg.UniLoRA(rank=2, vector_length=30, seed=1), targets=["up", "down"]))
    with pytest.raises(fg.AdapterError, match="another projection"):
        fg.add_tenant(banked, "other", other)
    fewer = fg.rewrite(mlp, fg.Spec(method, targets=["up"]))
    with pytest.raises(fg.AdapterError, match="other sites"):
        fg.add_tenant(banked, "fewer", fewer)
    assert fg.tenants(banked) == {"t0": 1, "t1": 2, "t2": 3}


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if forms_of(method)[:1] and forms_of(method)[0].derives]
)
def test_groups_that_derive_each_their_own_are_held_as_factors(mlp, name):
    method = METHODS[name]
    apart = fg.Spec(method, targets=["up", "down"], overrides={"down": replace(method, dropout=0.1)})
    one, two = adapters(mlp, fg.Spec(method, targets=["up", "down"])), adapters(mlp, apart)
    banked, x = fg.bank(mlp, two), torch.randn(3, 7)
    ids = fg.adapter_ids(banked, ["t2", "t0", None])
    torch.testing.assert_close(banked(x, adapter_ids=ids), rows(two, ["t2", "t0", None], mlp, x), rtol=1e-5, atol=1e-6)
    with pytest.raises(fg.AdapterError, match="several groups"):
        fg.add_tenant(fg.bank(mlp, one, capacity=4), "apart", two["t0"])


def test_tenants_come_and_go(mlp):
    spec = fg.Spec(fg.LoRA(rank=2), targets=["up"])
    own = adapters(mlp, spec, 4)
    banked = fg.bank(mlp, {"t0": own["t0"], "t1": own["t1"]}, capacity=3)
    x = torch.randn(1, 7)

    def run(name):
        with torch.no_grad():
            return banked(x, adapter_ids=fg.adapter_ids(banked, [name]))

    fg.add_tenant(banked, "t2", own["t2"])
    torch.testing.assert_close(run("t2"), own["t2"](x))
    with pytest.raises(fg.AdapterError, match="full"):
        fg.add_tenant(banked, "t3", own["t3"])
    fg.remove_tenant(banked, "t0")
    with pytest.raises(fg.AdapterError, match="no tenant"):
        run("t0")
    assert torch.equal(banked(x, adapter_ids=torch.tensor([1])), mlp(x))
    fg.add_tenant(banked, "t3", own["t3"])
    assert fg.tenants(banked) == {"t1": 2, "t2": 3, "t3": 1}
    torch.testing.assert_close(run("t3"), own["t3"](x))
    torch.testing.assert_close(run("t1"), own["t1"](x))
    fg.add_tenant(banked, "t1", own["t0"])
    torch.testing.assert_close(run("t1"), own["t0"](x))


def test_bad_input_changes_nothing(mlp):
    spec = fg.Spec(fg.LoRA(rank=2), targets=["up"])
    own = adapters(mlp, spec, 2)
    banked = fg.bank(mlp, own)
    before = {k: v.clone() for k, v in banked.state_dict().items()}
    big = fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=4), targets=["up"]))
    wide = fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=2), targets=["up", "down"]))
    for tenant, text in ((big, "rank="), (wide, "no stack there"), ({"up.A": torch.zeros(2, 7)}, "without a config")):
        with pytest.raises(fg.AdapterError, match=text):
            fg.add_tenant(banked, "t0", tenant)
    assert all(torch.equal(before[k], v) for k, v in banked.state_dict().items())
    x = torch.randn(3, 7)
    with pytest.raises(fg.AdapterError, match="2 entries and the batch 3"):
        banked(x, adapter_ids=torch.zeros(2, dtype=torch.long))
    with pytest.raises(fg.AdapterError, match="whole numbers"):
        banked(x, adapter_ids=["t0", None, "t1"])
    for wrong in (3, -1):
        with pytest.raises(fg.AdapterError, match=f"no slot '{wrong}'; slots go from 0"):
            banked(x, adapter_ids=torch.tensor([0, 1, wrong]))
    with pytest.raises(fg.AdapterError, match="is no bank"):
        fg.tenants(mlp)
    with pytest.raises(fg.AdapterError, match="capacity"):
        fg.bank(mlp, own, capacity=1)
    with pytest.raises(fg.MergeError, match="GLoRA"):
        fg.bank(mlp, adapters(mlp, fg.Spec(fg.GLoRA(rank=2), targets=["up"])))
    with pytest.raises(fg.MergeError, match="several adapters"):
        fg.merge(banked)
    with pytest.raises(fg.SpecError, match="one number of experts"):
        hydra = {n: fg.rewrite(mlp, fg.Spec(fg.HydraLoRA(rank=2, experts=n), targets=["up"])) for n in (2, 3)}
        fg.bank(mlp, {str(n): m for n, m in hydra.items()})


def test_copies_pickles_and_leaves(mlp):
    own = adapters(mlp, fg.Spec(fg.LoRA(rank=2), targets=["up"]))
    banked = fg.bank(mlp, own)
    assert isinstance(banked, MLP) and type(banked).__name__ == "MLP"
    x, ids = torch.randn(3, 7), torch.tensor([1, 0, 2])
    with torch.no_grad():
        want = banked(x, adapter_ids=ids)
        for twin in (copy.deepcopy(banked), pickle.loads(pickle.dumps(banked))):
            assert torch.equal(twin(x, adapter_ids=ids), want)
            assert fg.tenants(twin) == fg.tenants(banked)
        with fg.disabled(banked):
            assert torch.equal(banked(x), mlp(x))
        assert torch.equal(banked(x, adapter_ids=ids), want)
    fg.remove(banked, "bank")
    assert type(banked) is MLP
    with pytest.raises(TypeError):
        banked(x, adapter_ids=ids)


def test_generate_with_adapters(llama, gpt2):
    for model, targets in ((llama, ["q_proj", "v_proj"]), (gpt2, [fg.Target("c_attn", 3, (0, 2))])):
        own = adapters(model, fg.Spec(fg.LoRA(rank=2), targets=targets), 2)
        banked = fg.bank(model, own)
        names = ["t0", None, "t1"]
        prompt = torch.randint(3, 90, (3, 5))
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        got = banked.generate(prompt, adapter_ids=fg.adapter_ids(banked, names), **options)
        for i, name in enumerate(names):
            alone = (model if name is None else own[name]).generate(prompt, **options)
            assert torch.equal(got[i], alone[i, : got.shape[1]])


@pytest.mark.parametrize("method", [METHODS[m] for m in FORMS], ids=FORMS)
def test_compiled_once(mlp, method):
    own = adapters(mlp, fg.Spec(method, targets=["up", "down"]), 4)
    banked = fg.bank(mlp, {"t0": own["t0"], "t1": own["t1"]}, capacity=3)
    torch._dynamo.reset()
    counters.clear()
    fast = fg.compile(banked, fullgraph=True, dynamic=True)
    with torch.no_grad():
        # five samples, not four: under dynamic=True Dynamo takes sizes that are equal for one size (four slots here)
        fast(torch.randn(5, 7), adapter_ids=torch.tensor([0, 1, 2, 0, 1]))
        compiled = counters["stats"]["unique_graphs"]
        x = torch.randn(6, 7)
        for change in (
            lambda: None,
            lambda: fg.add_tenant(banked, "t2", own["t2"]),
            lambda: fg.remove_tenant(banked, "t0"),
            lambda: fg.add_tenant(banked, "t3", own["t3"]),
        ):
            change()
            names = [*fg.tenants(banked), None, *fg.tenants(banked)][:6]
            names += [None] * (6 - len(names))
            got = fast(x, adapter_ids=fg.adapter_ids(banked, names))
            torch.testing.assert_close(got, rows(own, names, mlp, x), rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == compiled == 1
