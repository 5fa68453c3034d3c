"""Random programs that mix adapted products with reads, views, writes in place, buffers and modes.

A program is a list of statements over a pool of `(ROWS, WIDTH)` tensors. Whatever a statement makes joins the pool, so
that products, views and their writes get into each other's way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, WIDTH, LINEARS = 4, 8, 3
Statement = tuple[str, int, int, int]


def _fused(m: nn.Module, x: Tensor, _: Tensor, n: int) -> Tensor:
    parts = m.fused(x).split(WIDTH, -1)
    return parts[n % 2] + parts[1]


def _half(m: nn.Module, x: Tensor, other: Tensor, n: int) -> None:
    x[:, : 1 + n % (WIDTH - 1)] += 0.5


def _without_gradient(m: nn.Module, x: Tensor, other: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        return m.linears[n % LINEARS](x)


def _autocast(m: nn.Module, x: Tensor, other: Tensor, n: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.linears[n % LINEARS](x).float()


def _out(m: nn.Module, x: Tensor, other: Tensor, n: int) -> Tensor:
    made = torch.empty_like(x)
    torch.mul(x.detach(), 0.5, out=made.detach())
    return made


def _weight(m: nn.Module, x: Tensor, other: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        m.linears[n % LINEARS].weight.mul_(0.9)
    return m.linears[n % LINEARS](x)  # a base weight that is read without its adapter is refused


def _factor(m: nn.Module, x: Tensor, other: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        for parameter in m.linears[n % LINEARS].fxgraft.parameters():
            parameter.mul_(0.9)
    return m.linears[n % LINEARS](x)


def _set(m: nn.Module, x: Tensor, other: Tensor, n: int) -> None:
    x[n % ROWS] = other[0].detach()


#: statements that read: what they give joins the pool
READS: dict[str, Callable[[Any, Tensor, Tensor, int], Tensor]] = {
    "linear": lambda m, x, other, n: m.linears[n % LINEARS](x),
    "two linears": lambda m, x, other, n: m.linears[0](x) + m.linears[n % LINEARS](x),
    "sum into": lambda m, x, other, n: m.linears[n % LINEARS](x).add_(other),
    "fused": _fused,
    "add": lambda m, x, other, n: x + other,
    "tanh": lambda m, x, other, n: torch.tanh(x),
    "same": lambda m, x, other, n: F.dropout(x, 0.5, False),
    "view": lambda m, x, other, n: x.view(ROWS, 2, WIDTH // 2).flatten(1),
    "transposed": lambda m, x, other, n: x.t().t(),
    "rolled": lambda m, x, other, n: x[torch.tensor([1, 2, 3, 0])],
    "norm": lambda m, x, other, n: m.norm(x),
    "without gradient": _without_gradient,
    "autocast": _autocast,
    "out": _out,
    "random": lambda m, x, other, n: x + torch.rand(WIDTH),
    "cache": lambda m, x, other, n: m.cache * 1 + x,
    "weight": _weight,
    "factor": _factor,
}
#: statements whose result nobody reads
WRITES: dict[str, Callable[[Any, Tensor, Tensor, int], Any]] = {
    "add_": lambda m, x, other, n: x.add_(1.0),
    "mul_": lambda m, x, other, n: x.mul_(-0.5),
    "half": _half,
    "fill": lambda m, x, other, n: x[:, n % WIDTH].fill_(0.3),
    "copy": lambda m, x, other, n: x[1:].copy_(other[:-1].detach() * 1),
    "set": _set,
    "scatter": lambda m, x, other, n: x.scatter_(1, other.detach().argsort(1)[:, :2], 0.7),
    "masked": lambda m, x, other, n: x.masked_fill_(other.detach() > 0.5, 0.1),
    "index_add": lambda m, x, other, n: x.index_add_(0, torch.tensor([1, 0]), other[:2].detach() * 0.5),
    "clamp": lambda m, x, other, n: x.clamp_(-2.0, 2.0),
    "relu": lambda m, x, other, n: F.relu(x, inplace=True),
    "detached": lambda m, x, other, n: x.detach().add_(0.25),
    "transposed write": lambda m, x, other, n: x.t()[n % WIDTH].zero_(),
    "buffer": lambda m, x, other, n: m.cache.copy_(x.detach()),
    "count": lambda m, x, other, n: m.calls.add_(1),
    "drawn": lambda m, x, other, n: torch.rand(2),
}


class Random(nn.Module):
    """Runs a list of statements; the pool's last tensors and the buffers are the result."""

    def __init__(self, statements: list[Statement]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i != 1) for i in range(LINEARS))
        self.fused = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("cache", torch.zeros(ROWS, WIDTH))
        self.register_buffer("calls", torch.zeros(()))
        self.statements = statements

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pool = [x * 1]
        for name, first, second, n in self.statements:
            one, other = pool[first % len(pool)], pool[second % len(pool)]
            if name in READS:
                pool.append(READS[name](self, one, other, n))
            else:
                WRITES[name](self, one, other, n)
        return tuple(pool[-4:])


def draw(seed: int) -> list[Statement]:
    """A program of 6 to 14 statements; products are as frequent as writes."""
    rng = random.Random(seed)
    statements: list[Statement] = []
    for _ in range(rng.randint(6, 14)):
        kind = rng.random()
        if kind < 0.35:
            name = rng.choice(["linear", "two linears", "sum into", "fused", "linear"])
        else:
            name = rng.choice(list(WRITES if kind < 0.7 else READS))
        # recent tensors, so that programs do not fall apart into pieces that nobody reads
        statements.append((name, -1 - rng.randrange(3), -1 - rng.randrange(4), rng.randrange(8)))
    return statements
