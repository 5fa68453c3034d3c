"""Models that write into what a layer gave them: the adapted layer's output may be written into as the base's may."""

from __future__ import annotations

import copy

import methods
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxgraft as fg

PATHS = [
    ("lora", "lora", "lora", "vector", "vector"),
    ("lora", "none", "none", "none", "none"),
    ("vector", "vector", "vector", "constant", "vector"),
    ("none", "lora", "none", "none", "none"),
    ("none", "vector", "none", "none", "constant"),
    ("none", "none", "lora", "vector", "none"),
    ("none", "constant", "none", "none", "none"),
]
METHODS = {
    **methods.METHODS,
    **{"glora " + " ".join(path): fg.GLoRA(rank=2, path=fg.GLoRAPath(*path)) for path in PATHS},
}
#: name -> (writes into the output, the same without writing)
USES = {
    "mul": (lambda y, x: y.mul_(0.5), lambda y, x: y * 0.5),
    "residual": (lambda y, x: y.add_(x), lambda y, x: y + x),
    "relu": (lambda y, x: F.relu(y, inplace=True), lambda y, x: F.relu(y)),
    "gelu then scale": (lambda y, x: F.gelu(y).mul_(2), lambda y, x: F.gelu(y) * 2),
    "columns": (lambda y, x: _written(y), lambda y, x: torch.cat([y[..., :2] * 3, y[..., 2:]], -1)),
    "heads": (
        lambda y, x: y.view(*y.shape[:-1], 2, -1).div_(2).flatten(-2),
        lambda y, x: y.view(*y.shape[:-1], 2, -1).div(2).flatten(-2),
    ),
}  # fmt: skip


def _written(y: torch.Tensor) -> torch.Tensor:
    y[..., :2] *= 3
    return y


class Layer(nn.Module):
    def __init__(self, use, bias: bool) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.q, self.use = nn.Linear(8, 8), nn.Linear(8, 8, bias=bias), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.q(self.first(x)), x)


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(7)  # a supernet in training draws its paths
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return (y, *torch.autograd.grad(y.square().sum(), [x, *trained], allow_unused=True))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_written_into(method: str, shape: tuple[int, ...], parts: int) -> None:
    targets = ["q"] if parts == 1 else [fg.Target("q", parts=2, select=(1,))]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for inplace, pure in USES.values():
        for bias in (True, False):
            torch.manual_seed(0)
            base = Layer(pure, bias)
            want = methods.graft(base, fg.Spec(METHODS[method], targets=targets)).train()
            generator = torch.Generator().manual_seed(5)
            for tensor in fg.adapter_state(want).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            got = copy.deepcopy(want)
            got.use = inplace
            for a, b in zip(gradients(got, x), gradients(want, x), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(got.eval()(x), want.eval()(x), rtol=1e-4, atol=1e-5)
                if method not in ("hydralora", "supernet"):
                    torch.testing.assert_close(fg.merge(got)(x), want(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "hydralora", "glora lora lora lora vector vector", "supernet"])
def test_an_activation_that_writes_and_two_adapters(method: str) -> None:
    def model(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 8), nn.Dropout(0.0, inplace))

    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for inplace in (True, False):
        adapted = methods.graft(model(inplace), fg.Spec(METHODS[method], targets=["0", "2"]), name="a")
        adapted = fg.rewrite(adapted, fg.Spec(fg.LoRA(rank=2), targets=["0"]), name="b")
        generator = torch.Generator().manual_seed(5)
        for name in ("a", "b"):
            for tensor in fg.adapter_state(adapted, name).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        for names in (["a", "b"], {"b": 0.5, "a": -0.5}):
            fg.set_active(adapted, names)
            results.append(gradients(adapted.train(), x))
    for got, want in zip(results[:2], results[2:], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
