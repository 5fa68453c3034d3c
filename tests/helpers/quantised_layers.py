"""A linear layer in every way of storing its weight in few bits, and the same model with the weights dequantised.

The packages are optional: a test that asks for a layer of one that is not installed is skipped.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxgraft.rewriter.quantised.quantised import quantised

#: bitsandbytes packs weights for some CPUs, where both sizes must be whole blocks
FEATURES, HIDDEN = 64, 128


def _four_bit(linear: nn.Linear, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _eight_bit(linear: nn.Linear, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    options = {"has_fp16_weights": False, **options}
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_layer(linear: nn.Linear, config: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(linear)
        ao.quantize_(model, getattr(ao, config)(**options))
    return model[0]


def _int4(linear: nn.Linear) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization")
    return torchao_layer(linear, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=ao.PerGroup(32))


def _hqq(linear: nn.Linear) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    return hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


class PackedLinear(nn.Module):
    """Stands for GPTQ's layers, whose packages have no wheel for a CPU: 4-bit codes eight to an int32 along the input,
    `(in / 8, out)`, a scale and a zero per group and output, and the weight `(in, out)` on request."""

    group = 32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, 4
        weight = linear.weight.detach().t()  # (in, out)
        groups = weight.reshape(-1, self.group, self.out_features)
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
        codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15).to(torch.int32).reshape_as(weight)
        packed = torch.zeros(self.in_features // 8, self.out_features, dtype=torch.int32)
        for place in range(8):
            packed |= codes[place::8] << (4 * place)
        self.register_buffer("qweight", packed)
        self.register_buffer("qzeros", zeros.to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def dequantize_weight(self, num_itr: int = 1) -> torch.Tensor:
        codes = torch.stack([(self.qweight >> (4 * place)) & 15 for place in range(8)], 1)
        codes = codes.reshape(-1, self.group, self.out_features)
        return ((codes - self.qzeros[:, None]) * self.scales[:, None]).reshape(self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.dequantize_weight().to(x.dtype)
        return y if self.bias is None else y + self.bias


class SilentlyPacked(PackedLinear):
    """Stands for AWQ's layers, which have no method that dequantises: their product is all there is."""

    dequantize_weight = None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ PackedLinear.dequantize_weight(self).to(x.dtype)
        return y if self.bias is None else y + self.bias


LAYERS = {
    "nf4": lambda linear: _four_bit(linear, quant_type="nf4"),
    "fp4": lambda linear: _four_bit(linear, quant_type="fp4", compress_statistics=False),
    "int8": _eight_bit,
    "torchao int8": lambda linear: torchao_layer(linear, "Int8WeightOnlyConfig"),
    "torchao int4": _int4,
    "torchao fp8": lambda linear: torchao_layer(linear, "Float8WeightOnlyConfig"),
    "hqq": _hqq,
    "gptq": PackedLinear,
    "awq": SilentlyPacked,
}


class MLP(nn.Module):
    """Two quantised layers with a norm between, and a head that is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = (LAYERS[kind](linear) for linear in _linears())
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(F.silu(self.up(x)))))


def _linears() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES, bias=False)


def mlp(kind: str) -> MLP:
    """A model whose layers `up` and `down` are quantised, in training mode, without gradients."""
    return MLP(kind).requires_grad_(False)


def twin(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same function with plain linear layers: every quantised weight is what it dequantises to."""
    plain = nn.Module.__new__(type(model))
    nn.Module.__init__(plain)
    for name, child in model.named_children():
        if (kind := quantised(child)) is None:
            plain.add_module(name, child)
            continue
        weight, bias = kind.weight(child), child.bias
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = nn.Parameter(weight.to(dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(dtype))
        plain.add_module(name, layer)
    return plain.train(model.training).requires_grad_(False)
