"""Random small models: every form in which a model holds a linear map, put together in any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH = 8


class Matmul(nn.Module):
    """`x @ w (+ b)`, the weight stored `(in, out)` under another name."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_in, n_out) * 0.3)
        self.register_parameter("b", nn.Parameter(torch.randn(n_out)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        return y if self.b is None else y + self.b


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Fused(nn.Module):
    """q, k and v in one weight, as GPT-2 has them; the output is written into."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.qkv = Conv1D(3 * WIDTH, WIDTH) if kind is Conv1D else nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(WIDTH, -1)
        return x + torch.tanh(q * k) + v


class Feed(nn.Module):
    """Up and down, rectangular; `inplace` writes into the result of a layer."""

    def __init__(self, bias: bool, inplace: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12, bias=bias), nn.Linear(12, WIDTH, bias=bias)
        self.act = nn.ReLU(inplace=inplace)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.act(self.up(x))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.again(x)))


class Mixed(nn.Module):
    """Products that are no plain layers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.product, self.conv = Matmul(WIDTH, 10, bias), Conv1D(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.tanh(self.product(x)))


class Counted(nn.Module):
    """A layer that keeps a count and turns its input around: state, and rows that are not in the batch's order."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.turned(x.transpose(0, 1)).transpose(0, 1)


class Model(nn.Module):
    """A stem, blocks and a head; `tied` gives two blocks one weight."""

    def __init__(self, blocks: list[tuple[str, bool]], tied: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(make(kind, flag) for kind, flag in blocks)
        self.classifier = nn.Linear(WIDTH, 3)
        again = [layer for layer in self.layers if isinstance(layer, Twice)]
        if tied and len(again) > 1:
            again[1].again.weight = again[0].again.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def make(kind: str, flag: bool) -> nn.Module:
    return {
        "attention": lambda: Attention(flag),
        "fused": lambda: Fused(Conv1D if flag else nn.Linear),
        "feed": lambda: Feed(bias=not flag, inplace=flag),
        "twice": Twice,
        "mixed": lambda: Mixed(flag),
        "counted": Counted,
    }[kind]()


KINDS = ("attention", "fused", "feed", "twice", "mixed", "counted")
#: the layers with a weight of each kind of block, and how many equal parts a fused one has
LAYERS = {
    "attention": ("q", "k", "v", "o"),
    "fused": ("qkv",),
    "feed": ("up", "down"),
    "twice": ("again",),
    "mixed": ("product", "conv"),
    "counted": ("turned",),
}


def models() -> st.SearchStrategy[Model]:
    blocks = st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=4)
    return st.builds(Model, blocks, st.booleans(), st.integers(0, 5)).map(nn.Module.eval)


def layout(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight `(out, in)` and the bias of a layer of these models."""
    if isinstance(layer, Matmul):
        return layer.w.detach().t(), None if layer.b is None else layer.b.detach()
    weight = layer.weight.detach()
    return (weight.t() if isinstance(layer, Conv1D) else weight), None if layer.bias is None else layer.bias.detach()
