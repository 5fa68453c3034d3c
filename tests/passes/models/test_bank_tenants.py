"""Where tenants come from, each read by its own method; and what ids mean when tenants come and go between calls."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from small_models import perturb
from torch import nn

import fxgraft as fg


def adapted(model, method, targets=("up",), scale=0.3, **more):
    return perturb(fg.rewrite(model, fg.Spec(method, targets=list(targets), **more)), scale).eval()


def answers(banked, x, *names):
    with torch.no_grad():
        return banked(x, adapter_ids=fg.adapter_ids(banked, list(names)))


def each(models, x):
    """Row i from model i alone."""
    with torch.no_grad():
        return torch.stack([model(x)[i] for i, model in enumerate(models)])


# -- where they come from ----------------------------------------------------------------------------------------
OTHERS = {
    "alpha": (fg.LoRA(rank=2, alpha=4), fg.LoRA(rank=2, alpha=16)),
    "rslora": (fg.LoRA(rank=2, alpha=4), fg.LoRA(rank=2, alpha=4, rslora=True)),
    "rank": (fg.LoRA(rank=2, alpha=4), fg.LoRA(rank=3, alpha=4)),
    "method": (fg.LoRA(rank=2), fg.LoRAXS(rank=3, alpha=5)),
    "seed": (fg.UniLoRA(rank=2, vector_length=30, seed=1), fg.UniLoRA(rank=2, vector_length=30, seed=2)),
    "shifts": (fg.LoRA(rank=2), fg.PRoLoRA(rank=4, unshared=1, a_chunks=2, b_chunks=3)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_tenant_is_read_by_its_own_method(mlp, case, tmp_path):
    """As a state, a copy of one, a model or a folder: always what the tenant is alone, whatever the bank's model is."""
    method, other = OTHERS[case]
    mine, theirs = adapted(mlp, method, ("up", "down")), adapted(mlp, other, ("up", "down"))
    state = fg.adapter_state(theirs)
    fg.save_adapter(theirs, tmp_path / "a")
    forms = [state, state.copy(), pickle.loads(pickle.dumps(state)), theirs, tmp_path / "a", str(tmp_path / "a")]
    banked = fg.bank(mine, {f"t{i}": form for i, form in enumerate(forms)}, expand=case == "seed")
    x = torch.randn(len(forms), 7)
    torch.testing.assert_close(answers(banked, x, *fg.tenants(banked)), each([theirs] * len(forms), x))
    # The model's own adapter beside it, and tenants that come later.
    banked = fg.bank(mine, {"mine": fg.adapter_state(mine)}, capacity=8, rank=6, expand=case == "seed")
    for i, form in enumerate(forms):
        fg.add_tenant(banked, f"t{i}", form)
    x = torch.randn(3, 7)
    torch.testing.assert_close(answers(banked, x, "mine", "t0", "t4"), each([mine, theirs, theirs], x))


def test_a_bank_of_one_projection_refuses_another_seed(mlp):
    first, second = OTHERS["seed"]
    mine, theirs = adapted(mlp, first), adapted(mlp, second)
    banked = fg.bank(mine, {"mine": mine}, capacity=2)
    with pytest.raises(fg.AdapterError, match="another projection"):
        fg.add_tenant(banked, "theirs", fg.adapter_state(theirs))
    assert fg.tenants(banked) == {"mine": 1}


def test_a_plain_dict_is_taken_as_the_models_method(mlp):
    mine, theirs = adapted(mlp, fg.LoRA(rank=2, alpha=4)), adapted(mlp, fg.LoRA(rank=2, alpha=16))
    plain = dict(fg.adapter_state(theirs))
    x = torch.randn(1, 7)
    torch.testing.assert_close(
        answers(fg.bank(mlp, {"a": plain}, spec=fg.Spec(fg.LoRA(rank=2, alpha=16), targets=["up"])), x, "a"), theirs(x)
    )
    fg.swap(mine, plain)
    torch.testing.assert_close(answers(fg.bank(mine, {"a": plain}), x, "a"), mine(x))


def test_states_of_parts_heads_and_several_methods(gpt2, ids):
    """Slices of a fused weight, two methods in one adapter, a trained head: all from the state alone."""
    spec = fg.Spec(
        fg.LoRA(rank=2, alpha=8),
        targets=[fg.Target("c_attn", 3, (0, 2)), "c_fc"],
        overrides={"*c_fc": fg.LoRA(rank=3, alpha=3, rslora=True)},
    )
    tenant = perturb(fg.rewrite(gpt2, spec), 0.3).eval()
    banked = fg.bank(gpt2, {"a": fg.adapter_state(tenant), "b": tenant})
    with torch.no_grad():
        got = banked(ids, adapter_ids=fg.adapter_ids(banked, ["a", None, "b"])).logits
        want = torch.stack([tenant(ids).logits[0], gpt2(ids).logits[1], tenant(ids).logits[2]])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_state_with_a_trained_head(mlp):
    tenant = adapted(mlp, fg.LoRA(rank=2), train=["head"])
    banked = fg.bank(mlp, {"a": fg.adapter_state(tenant)})
    x = torch.randn(2, 7)
    torch.testing.assert_close(answers(banked, x, "a", None), each([tenant, mlp], x))
    without = adapted(mlp, fg.LoRA(rank=2))
    fg.add_tenant(banked, "a", fg.adapter_state(without))  # nothing of the head that was there is left
    torch.testing.assert_close(answers(banked, x, "a", None), each([without, mlp], x))


def test_states_that_are_refused(mlp):
    tenant = adapted(mlp, fg.LoRA(rank=2))
    banked = fg.bank(tenant, {"a": tenant}, capacity=2)
    before = {key: value.clone() for key, value in banked.state_dict().items()}

    def spoilt(value):
        state = fg.adapter_state(tenant).copy()
        state["up.A"] = torch.full_like(state["up.A"], value)
        return state

    other = nn.Sequential(nn.Linear(7, 7))
    foreign = fg.adapter_state(fg.rewrite(other, fg.Spec(fg.LoRA(rank=2), targets=["0"])))
    half = fg.adapter_state(tenant).copy()
    del half["up.B"]
    for name in ("a", "new"):
        for state in (spoilt(float("nan")), spoilt(float("inf")), foreign, half, 3, None):
            with pytest.raises(fg.AdapterError, match="tenant '" + name):
                fg.add_tenant(banked, name, state)
        fg.set_active(tenant, {"default": 0.5})
        with pytest.raises(fg.AdapterError, match=r"active with weight 0\.5"):
            fg.add_tenant(banked, name, tenant)
        fg.set_active(tenant, ["default"])
    with pytest.raises(fg.CheckpointError):
        fg.add_tenant(banked, "new", "/nowhere")
    assert all(torch.equal(before[key], value) for key, value in banked.state_dict().items())
    assert fg.tenants(banked) == {"a": 1}


def test_a_model_with_ids_of_its_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x, adapter_ids):
            return self.q(x) * adapter_ids

    tenant = fg.rewrite(Own(), fg.Spec(fg.LoRA(rank=2), targets=["q"]))
    with pytest.raises(fg.AdapterError, match="takes 'adapter_ids' itself"):
        fg.bank(tenant, {"a": tenant})


def test_values_too_large_for_the_stacks(mlp):
    tenant = adapted(mlp, fg.LoRA(rank=2), scale=1e6)
    small = adapted(mlp, fg.LoRA(rank=2))
    banked = fg.bank(mlp, {"a": small}, dtype=torch.float16)
    before = {key: value.clone() for key, value in banked.state_dict().items()}
    with pytest.raises(fg.AdapterError, match=r"too large for torch\.float16"):
        fg.add_tenant(banked, "a", tenant)
    assert all(torch.equal(before[key], value) for key, value in banked.state_dict().items())


# -- what ids mean -----------------------------------------------------------------------------------------------
def test_ids_of_a_tenant_that_left_are_refused(mlp):
    own = [adapted(mlp, fg.LoRA(rank=2)) for _ in range(3)]
    banked = fg.bank(mlp, {"a": own[0], "b": own[1]})
    x = torch.randn(2, 7)
    ids = fg.adapter_ids(banked, ["a", "b"])
    copies = [copy.deepcopy(banked), pickle.loads(pickle.dumps(banked))]
    fg.add_tenant(banked, "a", own[2])  # other values of the same tenant
    with torch.no_grad():
        torch.testing.assert_close(banked(x, adapter_ids=ids), each([own[2], own[1]], x))
    fg.remove_tenant(banked, "a")
    with pytest.raises(fg.AdapterError, match=r"slot 1 was tenant 'a' .*nobody sits there now"):
        banked(x, adapter_ids=ids)
    fg.add_tenant(banked, "c", own[2])
    with pytest.raises(fg.AdapterError, match=r"slot 1 was tenant 'a' .*'c' sits there now"):
        banked(x, adapter_ids=ids)
    for twin in copies:
        with torch.no_grad():
            torch.testing.assert_close(twin(x, adapter_ids=ids), each([own[0], own[1]], x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_every_kind(mlp, dtype):
    own = {"a": adapted(mlp, fg.LoRA(rank=2)), "b": adapted(mlp, fg.LoRA(rank=2))}
    banked = fg.bank(mlp, own)
    fast = fg.compile(banked)
    x = torch.randn(3, 7)
    want = each([own["b"], mlp, own["a"]], x)
    for run in (banked, fast):
        with torch.no_grad():
            torch.testing.assert_close(run(x, adapter_ids=torch.tensor([2, 0, 1], dtype=dtype)), want)
            torch.testing.assert_close(run(x, adapter_ids=None), mlp(x))
            torch.testing.assert_close(run(x[:0], adapter_ids=torch.zeros(0, dtype=dtype)), mlp(x[:0]))
        for wrong in ([0, 1, 3], [0, 1, -1]):
            with pytest.raises(fg.AdapterError, match="there is no slot"):
                run(x, adapter_ids=torch.tensor(wrong, dtype=dtype))
        for wrong in (torch.tensor([True, False, True]), torch.rand(3), torch.zeros(3, 1, dtype=dtype), 1, ["a"] * 3):
            with pytest.raises(fg.AdapterError, match="whole numbers"):
                run(x, adapter_ids=wrong)
        with pytest.raises(fg.AdapterError, match="2 entries and the batch 3"):
            run(x, adapter_ids=torch.zeros(2, dtype=dtype))


def test_a_bank_inside_a_graph_of_someone_elses(mlp):
    """A compiled parent sees plain code: it compiles whole, and its graph refuses slots that are not there."""
    own = {"a": adapted(mlp, fg.LoRA(rank=2))}
    banked = fg.bank(mlp, own, example_inputs=(torch.randn(3, 7),))

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = banked

        def forward(self, x, ids):
            return self.bank(x, adapter_ids=ids) * 2

    x = torch.randn(3, 7)
    run = torch.compile(Parent(), fullgraph=True)
    with torch.no_grad():
        got = run(x, torch.tensor([1, 0, 1]))
        torch.testing.assert_close(got, 2 * each([own["a"], mlp, own["a"]], x))
        for wrong in ([1, 0, -1], [1, 2, 0]):
            with pytest.raises((RuntimeError, IndexError), match=r"slots go from 0|out of"):
                run(x, torch.tensor(wrong))


def test_calls_that_only_record(mlp):
    """Under fake tensors there are no values of ids to look at."""
    from torch._subclasses import FakeTensorMode

    banked = fg.bank(mlp, {"a": adapted(mlp, fg.LoRA(rank=2))}, example_inputs=(torch.randn(3, 7),))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        ids = mode.from_tensor(torch.tensor([0, 1, 0]))
        assert banked(mode.from_tensor(torch.randn(3, 7)), adapter_ids=ids).shape == (3, 3)


def test_wrapped_layers():
    """Layers that are compiled or wrapped after the bank was made, each on its own."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    own = [adapted(model, fg.LoRA(rank=2), ("0", "2")) for _ in range(2)]
    x = torch.randn(3, 8)
    for wrap in (torch.compile, checkpoint_wrapper):
        banked = fg.bank(model, {"a": own[0], "b": own[1]})
        banked[0], banked[2] = wrap(banked[0]), wrap(banked[2])
        torch.testing.assert_close(answers(banked, x, "b", None, "a"), each([own[1], model, own[0]], x))
        fg.add_tenant(banked, "b", own[0])
        torch.testing.assert_close(answers(banked, x, "b", None, "a"), each([own[0], model, own[0]], x))


# -- tenants that come and go while others are served ------------------------------------------------------------
@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_gets_one_version_of_its_tenant(compiled):
    """Every answer is one of the versions that the tenant had, in whole: never half of one, nor another tenant's."""
    torch.manual_seed(0)
    layers = 6
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).double().eval()
    versions = [adapted(model, fg.LoRA(rank=2), [str(i) for i in range(layers)], 0.1) for _ in range(4)]
    banked = fg.bank(model, {"moving": versions[0], "fixed": versions[3]}, capacity=3)
    x = torch.randn(2, 16, dtype=torch.float64)
    want = [version(x)[0].detach() for version in versions]
    run = fg.compile(banked) if compiled else banked
    answers(run, x, "moving", "fixed")
    stop, wrong = threading.Event(), []

    def ask(_):
        ids = fg.adapter_ids(banked, ["moving", "fixed"])
        for _ in range(300):
            with torch.no_grad():
                got = run(x, adapter_ids=ids)
            moving = any(torch.allclose(got[0], one, atol=1e-5) for one in want[:3])
            if not moving or not torch.allclose(got[1], versions[3](x)[1], atol=1e-5):
                wrong.append(got)

    def move():
        turn = 0
        while not stop.is_set():
            turn += 1
            fg.add_tenant(banked, "moving", versions[turn % 3])
            fg.add_tenant(banked, "guest", versions[turn % 4])
            fg.remove_tenant(banked, "guest")

    mover = threading.Thread(target=move)
    mover.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, range(3)))
    stop.set()
    mover.join()
    assert not wrong, f"{len(wrong)} answers of no version"
    assert all((a - b).abs().max() > 1e-2 for a, b in pairwise(want))


def test_tenants_do_not_move_inside_a_call(mlp):
    own = adapted(mlp, fg.LoRA(rank=2))
    banked = fg.bank(mlp, {"a": own})
    banked.head.register_forward_pre_hook(lambda *_: fg.remove_tenant(banked, "a"))
    x = torch.randn(1, 7)
    with pytest.raises(fg.AdapterError, match="inside a call of the bank"):
        banked(x, adapter_ids=fg.adapter_ids(banked, ["a"]))


# -- gradients ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_in_a_backward_get_the_ids_of_their_call(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(lambda t: self.b(torch.tanh(self.a(t))), x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Deep().eval()
    own = {f"t{i}": adapted(model, fg.LoRA(rank=2), ("a", "b")) for i in range(2)}
    banked = fg.bank(model, own, example_inputs=(torch.randn(3, 8),))
    inputs = [torch.randn(3, 8, requires_grad=True) for _ in range(3)]
    choices = [["t0", None, "t1"], ["t1", "t1", "t0"], None]
    losses = []
    for x, names in zip(inputs, choices, strict=True):
        given = {} if names is None else {"adapter_ids": fg.adapter_ids(banked, names)}
        losses.append(banked(x, **given).square().sum())
    for loss in reversed(losses):
        loss.backward()
    for x, names in zip(inputs, choices, strict=True):
        for i, name in enumerate(names or [None] * 3):
            alone = x.detach()[i : i + 1].clone().requires_grad_()
            (own[name] if name else model)(alone).square().sum().backward()
            torch.testing.assert_close(x.grad[i : i + 1], alone.grad, rtol=1e-4, atol=1e-5)
