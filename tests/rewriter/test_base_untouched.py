"""The adapted model has what it writes for itself: the base keeps its buffers, its state and its weights' memory."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from methods import BIAS_FREE, MERGEABLE, METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.capture.skeleton import SMALL
from fxgraft.rewriter.capture.source_writes import written
from fxgraft.rewriter.state import record_of

BIG = SMALL // 4 + 4  # one float tensor of this many entries is above the line


def tick(buffer, amount):
    buffer[:2] += amount


class Layer(nn.Module):
    """A linear beside a buffer `state`, and what a forward does with it."""

    def __init__(self, how, size):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(size))
        self.how = how

    def forward(self, x):
        return self.q(x) + getattr(self, self.how)()

    def method(self):
        self.state.add_(1)
        return 0

    def augmented(self):
        self.state += 1
        return 0

    def item(self):
        self.state[0] = self.state[0] + 1
        return 0

    def alias(self):
        flat = self.state.view(-1)
        part = flat[:1]
        part.mul_(2).add_(1)
        return 0

    def into(self):
        torch.add(self.state, 1, out=self.state)
        return 0

    def helper(self):
        tick(self.state, amount=1)
        return 0

    def by_name(self):
        getattr(self, "state").copy_(self.state + 1)  # noqa: B009
        return 0

    def read(self):
        y = self.state[:1] * 2
        y += 1
        return y - 1


WRITES = ["method", "augmented", "item", "alias", "into", "helper", "by_name"]


@pytest.mark.parametrize("size", [3, BIG], ids=["small", "big"])
@pytest.mark.parametrize("how", WRITES)
def test_a_buffer_that_the_forward_writes_is_the_models_own(how, size):
    model = nn.Sequential(Layer(how, size))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "q"))
    adapted(torch.randn(2, 8))
    assert model[0].state.abs().sum() == 0 and adapted[0].state.abs().sum() > 0
    before = adapted[0].state.clone()
    fg.merge(perturb(adapted))(torch.randn(2, 8))
    assert torch.equal(adapted[0].state, before)


class Reads(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.register_buffer("table", torch.zeros(size))

    def forward(self, x):
        y = self.table[:1] * 2
        y += 1
        return self.q(x) + y


def test_a_large_buffer_that_is_only_read_is_shared():
    model = nn.Sequential(Reads(BIG))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "q"))
    assert adapted[0].table.data_ptr() == model[0].table.data_ptr()
    assert not written({Reads}, {"table"})


def test_views_and_ties_stay_what_they_are():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("again", self.whole)
            self.register_buffer("part", self.whole[:2])
            self.register_buffer("turned", self.q.weight.detach().t())

        def forward(self, x):
            self.part.add_(1)
            return self.q(x) + F.linear(x, self.turned.t()) + self.again[0]

    model = nn.Sequential(Tied())
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "q"))
    adapted(torch.randn(2, 8))
    assert model[0].whole.sum() == 0
    assert adapted[0].whole.tolist() == [1, 1, 0, 0] and adapted[0].again is adapted[0].whole
    assert adapted[0].turned.data_ptr() == model[0].q.weight.data_ptr()


def test_spectral_norm_iterates_on_its_own_vectors():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 4))
    before = copy.deepcopy(model.state_dict())
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "1")).train()
    for _ in range(3):
        adapted(torch.randn(2, 6))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_disabled_writes_the_adapted_models_buffers_only():
    model = nn.Sequential(Layer("method", 3))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "q"))
    with fg.disabled(adapted):
        adapted(torch.randn(2, 8))
    assert model[0].state.sum() == 0 and adapted[0].state.sum() == 3


@pytest.mark.parametrize("made", ["rewritten", "built"])
@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_does_not_cling_to_the_adapted_model(method, made):
    x = torch.randn(3, 8)
    if made == "built":
        with torch.inference_mode():
            model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        adapted = graft(model, fg.Spec(METHODS[method], ["0", "2"]))
    else:
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        with torch.inference_mode():
            adapted = graft(model, fg.Spec(METHODS[method], ["0", "2"]))
    assert adapted[0].weight.data_ptr() == model[0].weight.data_ptr()
    adapted(x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
    if method in MERGEABLE:
        perturb(adapted).eval()
        with torch.inference_mode():
            merged = fg.merge(adapted)
        torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-5)
        merged.requires_grad_(True)(x).sum().backward()


class Two(nn.Module):
    """Sites on `weight` and on other parameters, in either order of registration."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))

    def forward(self, x):
        return F.linear(F.linear(torch.tanh(x @ self.other), self.weight), self.third)


@pytest.mark.parametrize("method", BIAS_FREE)
@pytest.mark.parametrize("names", [("weight", "other", "third"), ("other", "third", "weight")])
def test_every_parameter_of_one_owner_trains_saves_and_merges(names, method, tmp_path):
    model, x = nn.Sequential(Two(names)), torch.randn(3, 4)
    adapted = graft(model, fg.Spec(BIAS_FREE[method], "all-linear"))
    adapted(x).sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert len(record_of(adapted, "default").sites) == 3
    perturb(adapted, 0.3).eval()
    sites = {key.rpartition(".")[0] for key in fg.adapter_state(adapted)} - {""}
    assert method == "unilora" or sites == {"0", "0.other", "0.third"}
    fg.save_adapter(adapted, tmp_path)
    torch.testing.assert_close(fg.load_adapter(model, tmp_path).eval()(x), adapted(x))
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(x), adapted(x))
    if method in MERGEABLE:
        torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-4, atol=1e-5)
    fg.remove(adapted, "default")
    assert torch.equal(adapted(x), model(x)) and list(adapted.state_dict()) == list(model.state_dict())


class Delegating(nn.Module):
    """Hands unknown attributes to the module inside, as many wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x) * 2


def test_a_wrapper_that_delegates_attributes_is_copied_as_itself():
    model, x = nn.Sequential(Delegating(nn.Linear(6, 6)), Delegating(Delegating(nn.Linear(6, 3)))), torch.randn(2, 6)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(2), "all-linear")))
    out = adapted(x)
    for twin in (
        copy.deepcopy(adapted),
        pickle.loads(pickle.dumps(adapted)),
        fg.rewrite(adapted, fg.Spec(fg.LoRA(2)), "b"),
    ):
        fg.set_active(twin, ["default"])
        assert type(twin[0]) is Delegating and torch.equal(twin(x), out)
    torch.testing.assert_close(fg.merge(adapted)(x), out, rtol=1e-5, atol=1e-6)
    with fg.disabled(adapted):
        assert torch.equal(adapted(x), model(x))


class Guarded(nn.Linear):
    """Leaves something out of its pickles and makes it anew, through hooks of its own."""

    def __init__(self):
        super().__init__(4, 4)
        self.handle = lambda: 1

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "handle"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.handle = max


def test_a_layers_own_pickling_is_obeyed():
    model, x = nn.Sequential(Guarded()), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(2), "0")))
    twin = pickle.loads(pickle.dumps(adapted))
    assert twin[0].handle is max and torch.equal(twin(x), adapted(x))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_another_librarys_adapters_is_refused(bert, wrapped):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(bert, peft.LoraConfig(target_modules=["query", "value"]))
    before = {n: t.clone() for n, t in theirs.state_dict().items()}
    given = theirs if wrapped else theirs.get_base_model()
    with pytest.raises(fg.AdapterError, match="merge_and_unload"):
        fg.rewrite(given, fg.Spec(fg.LoRA(2), "all-linear"))
    assert all(torch.equal(t, before[n]) for n, t in theirs.state_dict().items())
    plain = theirs.merge_and_unload()
    assert len(record_of(fg.rewrite(plain, fg.Spec(fg.LoRA(2), ["query"])), "default").sites) == 2
