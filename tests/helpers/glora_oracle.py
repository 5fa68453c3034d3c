"""GLoRA written out in float64: layers to adapt, paths to try, and what they must give."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxgraft as fg
from fxgraft.passes.methods.glora.glora import GLoRA, GLoRAPath

IN, OUT, RANK = 6, 5, 2
MAXIMAL = GLoRAPath("lora", "lora", "lora", "vector", "vector")
REPRESENTATIVE = [
    MAXIMAL,
    GLoRAPath("lora", "vector", "vector", "constant", "none"),
    GLoRAPath("lora", "none", "none", "none", "constant"),
    GLoRAPath("vector", "lora", "vector", "vector", "constant"),
    GLoRAPath("vector", "constant", "none", "none", "none"),
    GLoRAPath("constant", "vector", "lora", "constant", "vector"),
    GLoRAPath("none", "constant", "none", "vector", "none"),
    GLoRAPath("none", "lora", "none", "none", "none"),
]


class MatmulBias(nn.Module):
    """A weight that is read as `x @ W + b`: the bias is added behind the product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.randn(OUT))

    def forward(self, x):
        return x @ self.weight + self.bias


BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "bias-free": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: nn.init.normal_((c := Conv1D(OUT, IN)).bias) is not None and c,
    "matmul": MatmulBias,
}


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def wrapped(base: str, dtype: torch.dtype = torch.float64) -> Wrap:
    torch.manual_seed(0)
    return Wrap(BASES[base]()).to(dtype)


def adapt(model: nn.Module, path: GLoRAPath | None, rank: int = RANK, targets=("layer",), seed: int = 1) -> nn.Module:
    adapted = fg.rewrite(model, fg.Spec(GLoRA(rank=rank, path=path), targets=list(targets)))
    randomise(adapted, seed)
    return adapted


def randomise(adapted: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in fg.adapter_state(adapted).values():
        value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.5)


def plain(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `(out, in)` and bias of a base, float64."""
    weight = layer.weight.detach().double()
    weight = weight if isinstance(layer, nn.Linear) else weight.t()
    return weight, None if layer.bias is None else layer.bias.detach().double()


def oracle(weight, bias, path: GLoRAPath, full: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`W` and `b` by the definition, entry by entry, from the SUPERNET's tensors of one site."""
    out, inner = weight.shape
    t = {name: value.detach().double() for name, value in full.items()}

    def matrix(name: str, rows: int, columns: int) -> torch.Tensor:
        choice = getattr(path, name)
        result = torch.zeros(rows, columns, dtype=torch.float64)
        for i, j in itertools.product(range(rows), range(columns)):
            if choice == "lora":
                result[i, j] = sum(t[name + "d"][i, k] * t[name + "u"][k, j] for k in range(t[name + "d"].shape[1]))
            elif choice == "vector":
                result[i, j] = t[name + "d"][i, 0]
            elif choice == "constant":
                result[i, j] = t[name + "d"][0, 0]
        return result

    def line(name: str) -> torch.Tensor:
        choice = getattr(path, name)
        value = {"vector": lambda i: t[name][i], "constant": lambda i: t[name][0], "none": lambda i: torch.tensor(0.0)}
        return torch.stack([value[choice](i).double() for i in range(out)])

    b0 = torch.zeros(out, dtype=torch.float64) if bias is None else bias
    b = b0 + (0 if bias is None else b0 * line("D")) + line("E") + (weight @ matrix("C", inner, 1))[:, 0]
    return weight + weight * matrix("A", out, inner) + matrix("B", out, inner), b


def site_tensors(adapted: nn.Module, site: str = "layer") -> dict[str, torch.Tensor]:
    return {k.removeprefix(site + "."): v for k, v in fg.adapter_state(adapted).items()}
