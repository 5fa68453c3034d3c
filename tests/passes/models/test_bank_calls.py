"""Calls of one bank at the same time, inside one another, or ending in an error: each has its own adapter ids."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import MLP, perturb
from torch import nn

import fxgraft as fg


@pytest.fixture
def bank():
    """A bank of an MLP, its ids `[None, "t0", "t1"]`-wise and what each gives on its own."""
    torch.manual_seed(0)
    mlp = MLP().eval()
    own = {f"t{i}": perturb(fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=2), targets=["up"])), 0.3).eval() for i in range(2)}
    return mlp, own, fg.bank(mlp, own)


def check_threads(run, bank, x, calls):
    """Threads that each ask for another tenant, one of them without ids; every answer is its own tenant's."""
    mlp, own, banked = bank
    wrong = []
    start = threading.Barrier(4)

    def ask(name):
        ids = None if name == "without" else fg.adapter_ids(banked, [name] * len(x))
        given = {} if ids is None else {"adapter_ids": ids}
        with torch.no_grad():
            want = own.get(name, mlp)(x)
            start.wait()
            for _ in range(calls):
                if not torch.allclose(run(x, **given), want, atol=1e-5):
                    wrong.append(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, ["t0", "t1", None, "without"]))
    assert not wrong, f"{len(wrong)} wrong answers"


def test_threads(bank):
    check_threads(bank[2], bank, torch.randn(5, 7), 400)


def test_threads_of_a_compiled_bank(bank):
    torch._dynamo.reset()
    fast = fg.compile(bank[2])
    x = torch.randn(5, 7)
    with torch.no_grad():  # the compiler itself takes turns
        fast(x)
        fast(x, adapter_ids=torch.zeros(5, dtype=torch.long))
    check_threads(fast, bank, x, 400)


def test_a_call_inside_another(bank):
    """A banked model that calls a banked model: each with its own ids, and the outer goes on with its own."""
    inner = bank[2]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.inner = nn.Linear(7, 7), nn.Linear(7, 7), [inner]

        def forward(self, x, ids=None):
            x = self.first(x)
            return self.second(x) + self.inner[0](x, adapter_ids=ids).sum()

    torch.manual_seed(1)
    plain = Outer().eval()
    spec = fg.Spec(fg.LoRA(rank=2), targets=["first", "second"])
    adapted = perturb(fg.rewrite(plain, spec), 0.3).eval()
    outer = fg.bank(plain, {"a": adapted})
    x = torch.randn(3, 7)
    with torch.no_grad():
        got = outer(x, torch.full((3,), 2), adapter_ids=torch.ones(3, dtype=torch.long))
        torch.testing.assert_close(got, adapted(x, torch.full((3,), 2)))
        got = outer(x, None, adapter_ids=torch.ones(3, dtype=torch.long))
        torch.testing.assert_close(got, adapted(x, None))
        assert (adapted(x, None) - plain(x)).abs().max() > 1e-3


def test_after_an_error_the_next_call_is_the_base(bank):
    mlp, _, banked = bank

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    x = torch.randn(3, 7)
    handle = banked.get_submodule("head").register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        banked(x, adapter_ids=torch.ones(3, dtype=torch.long))
    handle.remove()
    assert torch.equal(banked.up(x), mlp.up(x))
    assert torch.equal(banked(x), mlp(x))
