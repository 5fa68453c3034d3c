"""A site that no forward reaches is never silent: it raises at the first forward that would go wrong."""

import copy
import functools
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import perturb
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)
LAST = "reads the base's values of"


class Lambda(nn.Module):
    """Forwards that were bound or captured before grafting."""

    def __init__(self, how):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        if how == "lambda":
            self.call = lambda x: self.q(x)
        elif how == "partial":
            self.call = functools.partial(F.linear, weight=self.q.weight)
        elif how == "closure":
            weight = self.q.weight
            self.call = lambda x: x @ weight.t()

    def forward(self, x):
        return self.call(self.k(x))


@pytest.mark.parametrize("how", ["lambda", "partial", "closure"])
def test_a_captured_forward_raises_at_the_first_forward(how):
    model, x = Lambda(how), torch.randn(3, 4)
    try:
        adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    except fg.FxgraftError:
        return
    for _ in range(2):
        with pytest.raises(fg.AdapterError, match=LAST):
            adapted(x)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))
    fg.set_active(adapted, [])
    torch.testing.assert_close(adapted(x), model(x))


class Gate(nn.Module):
    """Reads its child's weight in a way that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.on = nn.Linear(4, 4), nn.Linear(4, 4), True

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.k(x)
        return F.linear(y, self.q.weight, self.q.bias) if self.on else self.q(y)


def later(model=None, targets=("q",), **options):
    """A model whose site turns out dead at run time only."""
    model = model or Gate()
    model.on = False
    return model, perturb(fg.rewrite(model, fg.Spec(LORA, list(targets), **options)))


def raises_now(adapted):
    adapted.on = True
    with pytest.raises(fg.AdapterError, match=rf"{LAST} 'q'.*'default'"):
        adapted(torch.randn(3, 4))


def test_a_weight_read_by_the_parent_raises_and_the_hooks_stay_until_it_is_right():
    _, adapted = later()
    raises_now(adapted)
    adapted.on = False
    x = torch.randn(3, 4)
    torch.testing.assert_close(adapted(x), fg.merge(adapted)(x))
    assert not adapted._forward_hooks and not adapted._forward_pre_hooks


def test_copies_and_pickles_are_watched_too():
    _, adapted = later()
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        raises_now(twin)


def test_every_adapter_is_watched_once():
    _, adapted = later()
    adapted(torch.randn(3, 4))
    assert not adapted._forward_hooks
    both = perturb(fg.rewrite(adapted, fg.Spec(LORA, ["k"]), name="second"))
    both(torch.randn(3, 4))
    assert not both._forward_hooks
    fg.set_active(both, ["default"])  # this one a forward has proved
    assert not both._forward_hooks
    fg.remove(both, "default")
    again = fg.rewrite(both, fg.Spec(LORA, ["q"]))
    raises_now(again)


def test_plain_models_keep_no_hook():
    _, adapted = later()
    assert adapted._forward_hooks
    plain = fg.merge(adapted)
    assert not plain._forward_hooks and not plain._forward_pre_hooks and not plain._forward_hooks_always_called
    fg.remove(adapted, "default")
    assert not adapted._forward_hooks


def test_a_graph_is_judged_before_it_runs():
    class Reads(Gate):
        def forward(self, x):
            y = self.k(x)
            return F.linear(y, self.q.weight, self.q.bias) if self.on else self.q(y)

    _, adapted = later(Reads())
    adapted.on = True
    compiled = fg.compile(adapted)
    for _ in range(2):
        with pytest.raises(fg.AdapterError, match=rf"{LAST} 'q'"):
            compiled(torch.randn(3, 4))
    adapted.on = False
    torch._dynamo.reset()
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fg.compile(adapted)(x), adapted(x))


def test_an_interrupted_forward_leaves_nothing_behind():
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.how = nn.Linear(4, 4), RuntimeError

        def forward(self, x):
            y = self.q(x)
            if self.how is not None:
                raise self.how
            return y

    adapted = fg.rewrite(nn.Sequential(Stops()), fg.Spec(LORA, ["q"]))
    for how in (RuntimeError, KeyboardInterrupt):
        adapted[0].how = how
        with pytest.raises(how):
            adapted(torch.randn(2, 4))
    adapted[0].how = None
    adapted(torch.randn(2, 4))
    assert torch._C._len_torch_dispatch_stack() == 0 and not adapted._forward_hooks


def test_threads_are_watched_each():
    _, adapted = later()
    failures, x = [], torch.randn(3, 4)
    want = adapted.q(adapted.k(x)).detach()
    go = threading.Barrier(4)

    def run():
        go.wait()
        for _ in range(20):
            failures.append(not torch.allclose(adapted(x), want, atol=1e-5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 80 and not any(failures) and not adapted._forward_hooks


def test_a_trained_module_whose_base_values_are_read_raises():
    class Captured(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.call = lambda x: self.head(x)

        def forward(self, x):
            return self.call(self.q(x))

    adapted = None
    with pytest.raises(fg.FxgraftError):
        adapted = fg.rewrite(Captured(), fg.Spec(LORA, ["q"], train=["head"]))
        adapted(torch.randn(2, 4))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.experts[int(self.router(x).sum(0).argmax())](x)


def test_routed_experts_warn_and_go_on():
    model, x = Experts(), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["experts.*"])))
    with pytest.warns(UserWarning, match=r"did not reach 2 of 3 places.*experts"):
        first = adapted(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(adapted(x), first)
    torch.testing.assert_close(fg.merge(adapted)(x), first)


def test_a_head_tied_to_an_embedding_may_be_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids, logits=False):
            return self.head(self.embed(ids)) if logits else self.embed(ids)

    adapted = fg.rewrite(Model(), fg.Spec(LORA, ["head"]))
    with pytest.warns(UserWarning, match="did not reach 1 of 1"):
        adapted(torch.tensor([1, 2]))


def test_metadata_of_a_weight_may_be_read():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.skip = nn.Linear(4, 4), True

        def forward(self, x):
            x = x.to(self.q.weight.dtype).to(self.q.weight.device) + torch.zeros_like(self.q.weight).sum()
            x = x + self.q.weight.new_zeros(4) + self.q.weight.t().shape[0]
            return x if self.skip and x.sum() > -1e9 else self.q(x)

    adapted = fg.rewrite(nn.Sequential(Model()), fg.Spec(LORA, ["q"]))
    with pytest.warns(UserWarning, match="did not reach 1 of 1"):
        adapted(torch.randn(2, 4))


def test_a_bank_is_not_watched():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["0"])))
    bank = fg.bank(adapted, {"a": adapted})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(bank(x), model(x))
