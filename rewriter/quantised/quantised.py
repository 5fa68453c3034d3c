"""Which layers are quantised, and how: asked of a module, answered by the file of its package."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import AdapterError, CaptureError
from ..modules.scripted import is_scripted
from .bitsandbytes_layers import EightBit, FourBit
from .hqq_layers import HQQ
from .packed_layers import Packed
from .storage import Quantised
from .torchao_weights import TorchAO

KINDS: tuple[Quantised, ...] = (FourBit(), EightBit(), TorchAO(), HQQ(), Packed())
PRODUCT = "fxgraft_product"  # a grafted owner's method: the base's own product
BIAS = "fxgraft_bias"  # key in the meta of that call: the name of the bias it adds
WEIGHT_OF = "fxgraft_dequantised"  # its weight in floating point


def quantised(module: nn.Module) -> Quantised | None:
    """How a layer's weight is stored; None for one that is not quantised, or not in a way that is known."""
    return None if is_scripted(module) else next((kind for kind in KINDS if kind.holds(module)), None)


@dataclass(frozen=True)
class Stored:
    """What a site takes of a weight: its shape `(out, in)` and dtype in floating point, and its device."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module, kind: Quantised) -> Stored:
        return cls(kind.size(module), kind.dtype(module), kind.device(module))


def opaque_graph(module: nn.Module) -> fx.Graph:
    """The forward of a quantised layer as one call of its own.

    Raises:
        CaptureError: its forward takes more than its input.
    """
    given = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in given if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not given or len(needed) > 1 or len(given) > 1 or given[0].kind is not given[0].POSITIONAL_OR_KEYWORD:
        raise CaptureError(f"the forward of {type(module).__name__} takes more than one input")
    graph = fx.Graph()
    x = graph.placeholder(given[0].name)
    product = graph.call_module(PRODUCT, (x,))
    product.meta[BIAS] = "bias" if getattr(module, "bias", None) is not None else None
    graph.output(product)
    return graph


def opaque_call(graph: fx.Graph) -> fx.Node | None:
    """The call that stands for a quantised layer's product; None in a graph of another kind of owner."""
    return next((n for n in graph.nodes if n.op == "call_module" and n.target == PRODUCT), None)


def members(base: type[nn.Module], kind: Quantised) -> dict[str, Any]:
    """What the class of a grafted quantised owner has beside its forward."""

    def product(self: nn.Module, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad and (reason := kind.no_gradient(self)) is not None:
            raise AdapterError(f"a {base.__name__} cannot be trained through: {reason}")
        return kind.product(self, base.forward, x)

    def dequantised(self: nn.Module) -> Tensor:
        return kind.weight(self)

    return {PRODUCT: product, WEIGHT_OF: dequantised, **kind.members(base)}
