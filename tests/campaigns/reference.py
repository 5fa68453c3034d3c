"""The formulas of the methods in float64, written from the papers and from nothing of fxgraft's: the campaigns' oracle.

A reference model is a float64 copy of the base in which every adapted layer is replaced by `Reference`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxgraft as fg


@dataclass(frozen=True)
class Delta:
    """One adapter at one site: its config, its tensors, where its part of the output starts, and its weight."""

    method: Any
    tensors: Mapping[str, Tensor]
    offset: int
    length: int
    weight: float = 1.0
    scale: float = 1.0


def _chunks(chunk: Tensor, copies: int, length: int) -> Tensor:
    """`chunk (q, n)` repeated along its columns, copy k with its rows rotated by `k * max(q // copies, 1)`."""
    q = chunk.shape[0]
    step = max(q // copies, 1)
    return torch.cat([torch.roll(chunk, -k * step, 0) for k in range(copies)], 1)[:, :length]


def low_rank(method: Any, t: Mapping[str, Tensor], n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """`A (r, in)` and `B (out, r)`, the scale in B."""
    if isinstance(method, fg.LoRA):
        return t["A"], t["B"] * (method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank))
    if isinstance(method, fg.LoRAXS):
        return t["A"], t["B"] @ t["R"] * (method.alpha / method.rank)
    if isinstance(method, fg.LoRASB):
        return t["A"], t["B"] @ t["R"]
    if isinstance(method, fg.PRoLoRA):
        A, B = [], []
        if method.unshared < method.rank:
            A.append(_chunks(t["A_shared"], method.a_chunks, n_in))
            B.append(_chunks(t["B_shared"].t(), method.b_chunks, n_out).t())
        if method.unshared:
            A.append(t["A_unshared"])
            B.append(t["B_unshared"])
        return torch.cat(A), torch.cat(B, 1) * (method.alpha / method.rank)
    if isinstance(method, fg.UniLoRA):
        return t["A"], t["B"]
    raise TypeError(type(method))


def unilora_factors(method: Any, theta: Tensor, shapes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """The virtual A and B of all sites `(in, out)`, in order, from the vector."""
    total = sum(method.rank * (i + o) for i, o in shapes)
    rng = np.random.default_rng(method.seed)
    d = method.vector_length
    if method.sampler == "balanced":
        indices = np.repeat(np.arange(d), total // d)
        if total % d:
            indices = np.concatenate([indices, rng.choice(d, total % d, replace=False)])
        rng.shuffle(indices)
    else:
        indices = rng.integers(0, d, size=total)
    counts = torch.from_numpy(np.maximum(np.bincount(indices, minlength=d), 1)).double()
    flat, start, found = (theta / counts.sqrt())[torch.from_numpy(indices)], 0, []
    for n_in, n_out in shapes:
        a, b = method.rank * n_in, method.rank * n_out
        found.append({
            "A": flat[start : start + a].view(method.rank, n_in),
            "B": flat[start + a : start + a + b].view(n_out, method.rank),
        })  # fmt: skip
        start += a + b
    return found


def _support(choice: str, down: Tensor | None, up: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if choice == "lora":
        return down @ up
    if choice == "vector":
        return down[:, :1].expand(shape)
    return down.flatten()[0].expand(shape) if choice == "constant" else torch.zeros(shape, dtype=torch.float64)


def glora(method: Any, t: Mapping[str, Tensor], W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The change of the weight and of the bias: `W0 * A + B` and `b0 * D + E + W0 C`."""
    path = method.path or fg.GLoRAPath("lora", "lora", "lora", "vector", "vector")  # the supernet in eval
    A = _support(path.A, t.get("Ad"), t.get("Au"), W.shape)
    B = _support(path.B, t.get("Bd"), t.get("Bu"), W.shape)
    C = _support(path.C, t.get("Cd"), t.get("Cu"), (W.shape[1], 1))
    bias = (W @ C)[:, 0]
    for choice, name in ((path.D, "D"), (path.E, "E")):
        if choice != "none" and name in t:
            value = t[name] if choice == "vector" else t[name][:1].expand(W.shape[0])
            bias = bias + (value if name == "E" else b * value)
    return W * A + B, bias


class Reference(nn.Module):
    """A layer with its adapters, every product written out."""

    def __init__(self, base: nn.Module, weight: Tensor, bias: Tensor | None, deltas: Sequence[Delta]) -> None:
        super().__init__()
        self.base, self.deltas = base, deltas
        self.__dict__["W"], self.__dict__["b"] = weight, bias  # (out, in), (out,)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x).clone()
        for d in self.deltas:
            W = self.W[d.offset : d.offset + d.length]
            b = None if self.b is None else self.b[d.offset : d.offset + d.length]
            y[..., d.offset : d.offset + d.length] += d.weight * self.delta(d, x, W, b)
        return y

    @staticmethod
    def delta(d: Delta, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        t, method = d.tensors, d.method
        if isinstance(method, fg.GLoRA):
            dW, db = glora(method, t, W, b)
            return x @ dW.t() + db
        if isinstance(method, fg.HydraLoRA):
            gates = torch.softmax(x @ t["router"].t(), -1)
            z, total = x @ t["A"].t(), 0
            for i in range(method.experts):
                total = total + gates[..., i : i + 1] * (z @ t["B"][i * method.rank : (i + 1) * method.rank])
            return total * (method.alpha / method.rank)
        A, B = low_rank(method, t, W.shape[1], W.shape[0])
        return x @ A.t() @ B.t()


def reference_model(
    base: nn.Module, layers: Mapping[str, list[Delta]], trained: Mapping[str, Mapping[str, Tensor]], layout: Any
) -> nn.Module:
    """A float64 model with these adapters.

    Args:
        layers: site's layer -> its adapters.
        trained: module -> the values it was trained to.
        layout: `layout(module) -> weight (out, in), bias`.
    """
    model = copy.deepcopy(base).double().eval()
    for path, values in trained.items():
        # a module of its own: what was tied to the base's stays the base's
        parent, _, leaf = path.rpartition(".")
        own = copy.deepcopy(model.get_submodule(path))
        own.load_state_dict({k: v.double() for k, v in values.items()})
        setattr(model.get_submodule(parent), leaf, own)
    for path, deltas in layers.items():
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(path)
        setattr(model.get_submodule(parent), leaf, Reference(layer, *layout(layer), deltas))
    return model
