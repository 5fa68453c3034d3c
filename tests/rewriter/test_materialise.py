"""Models made on the meta device, or emptied: a forward without the values is an error, then they are right."""

import copy
import pickle

import pytest
import torch
from methods import METHODS, graft, needs_estimate
from small_models import perturb
from torch import nn

import fxgraft as fg


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.v(torch.tanh(self.q(x)))))


def spec(method):
    return fg.Spec(METHODS[method], ["q", "v"], train=["head"])


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def base():
    return Model().eval()


@pytest.fixture
def x():
    return torch.randn(4, 8)


def on_meta(method):
    with torch.device("meta"):
        model = Model().eval()
    return graft(model, spec(method))


def test_a_loaded_model_gets_what_is_derived(base, method, x):
    trained = perturb(graft(base, spec(method)), 0.3)
    for assign in (True, False):
        adapted = on_meta(method)
        if not assign:
            adapted.to_empty(device="cpu")
        adapted.load_state_dict(trained.state_dict(), assign=assign)
        if {name for name, _ in trained.named_buffers()} - set(trained.state_dict()):  # derived, not loaded
            with pytest.raises(fg.AdapterError, match=r"fg\.materialise"):
                adapted(x)
        assert fg.materialise(adapted) is adapted
        assert torch.equal(adapted(x), trained(x))
        adapted(x).sum().backward()
        assert adapted.head.fxgraft.default.weight.grad is not None


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not needs_estimate(method)])
def test_what_nothing_was_loaded_into_starts_as_rewrite_would(base, method, x):
    adapted = on_meta(method)
    with pytest.raises(fg.AdapterError, match="no values yet"):
        adapted(torch.empty(4, 8, device="meta"))
    with pytest.raises(fg.AdapterError, match="on the meta device: load"):
        fg.materialise(adapted)
    adapted.load_state_dict(base.state_dict(), strict=False, assign=True)
    with pytest.raises(fg.AdapterError, match=r"fg\.materialise"):
        adapted(x)
    torch.manual_seed(3)
    fg.materialise(adapted)
    torch.manual_seed(3)
    expected = graft(base, spec(method))
    torch.testing.assert_close(adapted(x), expected(x))
    for key, tensor in fg.adapter_state(expected).items():
        assert torch.equal(fg.adapter_state(adapted)[key], tensor)
    assert not any(t.is_meta for t in adapted.state_dict().values())


def test_a_real_model_that_is_emptied(base, method, x):
    adapted = perturb(graft(base, spec(method)), 0.3)
    state, out = copy.deepcopy(adapted.state_dict()), adapted(x)
    adapted.to_empty(device="cpu")
    with pytest.raises(fg.AdapterError, match="no values yet"):
        adapted(x)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        with pytest.raises(fg.AdapterError, match="no values yet"):
            twin(x)
    adapted.load_state_dict(state)
    fg.materialise(adapted)
    assert torch.equal(adapted(x), out)


def test_swap_and_writing_in_place_give_values(base, x):
    trained = perturb(fg.rewrite(base, spec("unilora")), 0.3)
    adapted = on_meta("unilora").to_empty(device="cpu")
    adapted.load_state_dict(base.state_dict(), strict=False)
    fg.swap(adapted, fg.adapter_state(trained))
    fg.materialise(adapted)
    assert torch.equal(adapted(x), trained(x))
    adapted = on_meta("lora").to_empty(device="cpu")
    adapted.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "fxgraft" in name:
                parameter.fill_(0.5)
    adapted(x)  # everything has been written
    fg.materialise(adapted)
    assert (adapted.q.fxgraft.default.A == 0.5).all()


def test_a_model_that_is_there_is_left_alone(base, method, x):
    adapted = perturb(graft(base, spec(method)), 0.3)
    out = adapted(x)
    for moved in (adapted, adapted.to("cpu"), adapted.double().float(), fg.materialise(adapted)):
        assert torch.equal(moved(x), out)
    with pytest.raises(fg.AdapterError, match="has no adapter"):
        fg.materialise(base)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.type(torch.float16), lambda m: m.to(torch.bfloat16)])
def test_indices_stay_whole_numbers(base, cast):
    adapted = fg.rewrite(base, spec("unilora"))
    kinds = {n: b.dtype for n, b in adapted.named_buffers() if not b.is_floating_point()}
    cast(adapted)
    assert kinds and {n: b.dtype for n, b in adapted.named_buffers() if not b.is_floating_point()} == kinds


def test_an_adapter_that_starts_from_an_estimate_is_loaded(base):
    batches = [{"x": torch.randn(4, 8)}]
    estimate = fg.estimate_update(base, batches, targets=["q"], loss=lambda out, batch: out.sum(), samples=4, lr=0.1)
    trained = fg.rewrite(base, fg.Spec(fg.LoRASB(2), ["q"]), update=estimate)
    with torch.device("meta"):
        empty = Model().eval()
    adapted = fg.rewrite(empty, fg.Spec(fg.LoRASB(2), ["q"]), update=estimate)
    adapted.load_state_dict(base.state_dict(), strict=False, assign=True)
    with pytest.raises(fg.FxgraftError):
        fg.materialise(adapted)
    adapted.load_state_dict(trained.state_dict(), assign=True)
    fg.materialise(adapted)
    x = torch.randn(4, 8)
    assert torch.equal(adapted(x), trained(x))


def test_an_emptied_head_shows_and_starts_from_the_base(base, x):
    adapted = fg.rewrite(base, spec("lora")).to_empty(device="cpu")
    adapted.load_state_dict(base.state_dict(), strict=False)
    assert torch.isnan(adapted.head.fxgraft.default.weight).all()
    fg.materialise(adapted)
    torch.testing.assert_close(adapted(x), base(x))
