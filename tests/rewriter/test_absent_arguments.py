"""A forward that goes another way where an argument is left out: the adapter is on every way, or it is refused."""

import copy
import pickle

import pytest
import torch
from small_models import perturb
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)


class Ways(nn.Module):
    """Its weight takes part on each of four ways."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, scale=None, *, shift=None, handed=None):
        y = x @ self.weight
        if scale is None:
            y = y * 3
        else:
            y = y * scale
        if shift is not None:
            y = torch.tanh(y) + shift
        return torch.clamp(y, -50, handed)


CALLS = [{}, {"scale": torch.tensor(2.0)}, {"shift": 1.0}, {"scale": 0.5, "shift": 2.0}, {"handed": 1.0}]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_way(call):
    model, x = nn.ModuleDict({"a": Ways()}), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["a"])))
    want = fg.merge(adapted)["a"](x, **call)
    assert not torch.allclose(want, model["a"](x, **call), atol=1e-3)
    for twin in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(twin["a"](x, **call), want)
        with fg.disabled(twin):
            assert torch.equal(twin["a"](x, **call), model["a"](x, **call))
    torch._dynamo.reset()
    compiled = torch.compile(adapted["a"], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **call), want)


class Squared(nn.Module):
    """Without a mask the weight is no factor of a product."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, mask=None):
        if mask is None:
            return x @ self.weight.square()
        return x @ self.weight * mask


def test_a_way_without_the_product_is_refused_when_it_is_called():
    model, x = nn.ModuleDict({"a": Squared()}), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["a"])))
    mask = torch.ones(4)
    torch.testing.assert_close(fg.merge(adapted)["a"](x, mask), adapted["a"](x, mask))
    with pytest.raises(fg.CaptureError, match="without 'mask', and where it is left out its forward takes another way"):
        adapted["a"](x)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted["a"](x), model["a"](x))
