"""Threads on one model: every answer is the one this thread asked for, whatever the others do meanwhile.

Each thread draws operations: adapted and disabled calls (nested, under checkpointing with gradients, of the compiled
model), calls of a bank with its own tenants, and on copies of its own switching, swapping, combining, removing. A last
round switches and swaps the shared model itself: base answers stay right throughout, and adapted ones once it is over.
"""

import copy
import os
import pickle
import random
import threading
import time
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxgraft as fg

SECONDS = 6 * float(os.environ.get("FXGRAFT_CAMPAIGN_SCALE", "1"))
THREADS = int(os.environ.get("FXGRAFT_CAMPAIGN_THREADS", "2"))
TENANTS = ["x", "y", "z", None]


def noisy(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in fg.adapter_state(model, name).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


class Shared:
    """One adapted model and one bank that all threads call, and the answers computed before any of them ran."""

    def __init__(self):
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
        model = fg.rewrite(self.base, fg.Spec(fg.LoRA(rank=2), targets=["re:0", "re:2"], train=["re:4"]), name="a")
        model = fg.rewrite(noisy(model, "a", 1), fg.Spec(fg.UniLoRA(rank=2, vector_length=30), ["re:2"]), name="b")
        path = fg.GLoRAPath("lora", "vector", "none", "vector", "constant")
        model = fg.rewrite(noisy(model, "b", 2), fg.Spec(fg.GLoRA(rank=2, path=path), ["re:0"]), name="c")
        self.model = noisy(model, "c", 3).eval()
        self.weights = {"a": 1.0, "b": 0.5}
        fg.set_active(self.model, self.weights)
        self.compiled = torch.compile(self.model, backend="eager", fullgraph=True)
        spec = fg.Spec(fg.LoRA(rank=2), targets=["re:0", "re:2"])
        tenants = {n: noisy(fg.rewrite(self.base, spec), "default", i) for i, n in enumerate("xyz", 10)}
        self.bank = fg.bank(self.base, tenants)
        self.x = [torch.randn(len(TENANTS), 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        with torch.no_grad():
            self.on, self.off = [self.model(x) for x in self.x], [self.base(x) for x in self.x]
            self.rows = {n: [m(x) for x in self.x] for n, m in {**tenants, None: self.base}.items()}
        self.slopes = {model: [self.slope(model, x) for x in self.x] for model in (self.model, self.base)}

    def slope(self, model, x, through=None):
        x = x.clone().requires_grad_()
        y = model(x) if through is None else checkpoint(model, x, use_reentrant=through)
        if through:
            (y.square().sum()).backward()
            return x.grad
        return torch.autograd.grad(y.square().sum(), x)[0]


def same(got, want):
    return torch.allclose(got, want, rtol=1e-4, atol=1e-5)


class Thread:
    """Operations of one thread, each returning whether its answer is right."""

    def __init__(self, shared, seed):
        self.s, self.draw = shared, random.Random(seed)

    def pick(self):
        i = self.draw.randrange(len(self.s.x))
        return i, self.s.x[i]

    @torch.no_grad()
    def adapted(self):
        i, x = self.pick()
        return same(self.s.model(x), self.s.on[i])

    @torch.no_grad()
    def disabled(self):
        i, x = self.pick()
        with fg.disabled(self.s.model):
            right = same(self.s.model(x), self.s.off[i])
            with fg.disabled(self.s.model):
                right &= same(self.s.model(x), self.s.off[i])
            time.sleep(self.draw.choice([0, 0, 1e-4]))
            right &= same(self.s.model(x), self.s.off[i])
        return right & same(self.s.model(x), self.s.on[i])

    @torch.no_grad()
    def compiled(self):
        i, x = self.pick()
        right = same(self.s.compiled(x), self.s.on[i])
        with fg.disabled(self.s.compiled):
            return right & same(self.s.compiled(x), self.s.off[i])

    def gradients(self):
        """Of the input alone: parameters' `.grad` is the model's, and so everybody's."""
        i, x = self.pick()
        right = same(self.s.slope(self.s.model, x, through=False), self.s.slopes[self.s.model][i])
        with fg.disabled(self.s.model):
            y = checkpoint(self.s.model, x := x.clone().requires_grad_(), use_reentrant=False)
        return right & same(torch.autograd.grad(y.square().sum(), x)[0], self.s.slopes[self.s.base][i])

    @torch.no_grad()
    def bank(self):
        i, x = self.pick()
        names = [self.draw.choice(TENANTS) for _ in range(len(x))]
        got = self.s.bank(x, adapter_ids=fg.adapter_ids(self.s.bank, names))
        return all(same(got[row], self.s.rows[name][i][row]) for row, name in enumerate(names))

    @torch.no_grad()
    def copies(self):
        i, x = self.pick()
        copied = copy.deepcopy(self.s.model)
        twin = self.draw.choice([lambda: copied, lambda: pickle.loads(pickle.dumps(copied))])()
        right = same(twin(x), self.s.on[i]) and fg.active_weights(twin) == self.s.weights
        fg.set_active(twin, ["c"])
        right &= same(twin(x), fg.merge(twin)(x)) and not same(twin(x), self.s.on[i])
        fg.swap(twin, {k: torch.zeros_like(v) for k, v in fg.adapter_state(twin, "c").items()}, "c")
        right &= same(twin(x), self.s.off[i])
        for name in self.draw.sample("abc", 3):
            fg.remove(twin, name)
        return right & same(twin(x), self.s.off[i])

    @torch.no_grad()
    def merged(self):
        i, x = self.pick()
        return same(fg.merge(self.s.model)(x), self.s.on[i])

    @torch.no_grad()
    def combined(self):
        _, x = self.pick()
        one = fg.combine(self.s.model, {"b": 0.5})
        return same(one(x), fg.merge(self.s.model, {"b": 0.5})(x))


OPERATIONS = ["adapted", "disabled", "compiled", "gradients", "bank", "copies", "merged", "combined"]


def together(count, run):
    """Run `run(number)` in threads; their exceptions come out here."""
    raised = []

    def guarded(number):
        try:
            run(number)
        except BaseException as error:  # told to the test below
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.campaign
def test_threads_on_one_model():
    torch._dynamo.reset()
    shared, done, wrong = Shared(), Counter(), Counter()
    before = {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}
    end = time.monotonic() + SECONDS

    def run(number):
        thread = Thread(shared, number)
        while time.monotonic() < end:
            operation = thread.draw.choice(OPERATIONS)
            right = getattr(thread, operation)()
            done[operation] += 1
            wrong[operation] += not right

    together(THREADS, run)
    print(f"\n{THREADS} threads, {sum(done.values())} operations ({dict(done)}), {sum(wrong.values())} wrong")
    assert sum(wrong.values()) == 0, +wrong
    assert set(done) == set(OPERATIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in shared.model.state_dict().items())
    assert fg.active_weights(shared.model) == shared.weights


@pytest.mark.campaign
def test_the_base_while_the_model_is_switched():
    """One thread switches and swaps the shared model, the others call the base through it."""
    shared, calls, wrong, switches = Shared(), Counter(), Counter(), Counter()
    end = time.monotonic() + SECONDS
    choices = [["a"], {"b": 2.0, "a": 1.0}, [], ["c"], {"c": 0.5, "b": -1.0}, {"a": 0.25}]

    def run(number):
        draw = random.Random(number)
        state = {k: v.clone() for k, v in fg.adapter_state(shared.model, "b").items()}
        while time.monotonic() < end:
            if number == 0:
                fg.set_active(shared.model, draw.choice(choices))
                fg.swap(shared.model, {k: torch.randn_like(v) for k, v in state.items()}, "b")
                fg.swap(shared.model, state, "b")
                switches["done"] += 1
                continue
            i = draw.randrange(len(shared.x))
            with torch.no_grad(), fg.disabled(shared.model):
                wrong["base"] += not same(shared.model(shared.x[i]), shared.off[i])
            calls["base"] += 1

    together(THREADS, run)
    print(f"\n{switches['done']} switches, twice as many swaps, {calls['base']} base calls, {wrong['base']} wrong")
    assert wrong["base"] == 0 and switches["done"] > 0 and calls["base"] > 0
    fg.set_active(shared.model, shared.weights)
    with torch.no_grad():
        assert all(same(shared.model(x), want) for x, want in zip(shared.x, shared.on, strict=True))
