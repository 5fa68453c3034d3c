"""The product of a GLoRA supernet in training, `x (W0 * (1 + A))^T + b0`, at the price of the path that was drawn.

A low-rank A needs the full gradient of its effective weight, a third product beside the two of a frozen base; rows and
constants need none. Which of them a forward drew is data, so that no path is compiled anew: the choice is made inside
an operator that compilers do not look into. On an accelerator looking at it would stall the queue at every site, and
all paths cost what a low-rank one costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .effective_weight import product_like

_library = torch.library.Library("fxgraft_kernels", "FRAGMENT")
_TENSORS = "Tensor weight, Tensor? bias, Tensor P, Tensor Q, Tensor low_rank"
_library.define(f"scaled_linear(Tensor x, {_TENSORS}) -> (Tensor, Tensor)")
_library.define(f"scaled_linear_backward(Tensor g, Tensor x, Tensor y0, {_TENSORS}) -> (Tensor, Tensor, Tensor)")


def effective(weight: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """`W0 * (1 + P Q)` in the memory layout of the weight."""
    return torch.addcmul(weight, weight, product_like(P, Q, weight).to(weight.dtype))


def _drawn(low_rank: Tensor) -> bool:
    return low_rank.device.type != "cpu" or bool(low_rank)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, P: Tensor, Q: Tensor, low_rank: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        if _drawn(low_rank):
            y = F.linear(x, effective(weight, P, Q).to(x.dtype), bias)
            return y, torch.empty_like(y)  # not written, so no memory is touched
        y0 = F.linear(x, weight.to(x.dtype), bias)
        return torch.addcmul(y0, y0 if bias is None else y0 - bias, P[:, -1].to(x.dtype)), y0


def _backward(
    g: Tensor, x: Tensor, y0: Tensor, weight: Tensor, bias: Tensor | None, P: Tensor, Q: Tensor, low_rank: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        g = g.to(x.dtype)
        if _drawn(low_rank):
            dense = (g.t() @ x).to(P.dtype) * weight
            return g @ effective(weight, P, Q).to(g.dtype), dense @ Q.t(), P.t() @ dense
        gradient = torch.zeros_like(P)
        gradient[:, -1] = (g * (y0 if bias is None else y0 - bias)).sum(0)
        return torch.addcmul(g, g, P[:, -1].to(g.dtype)) @ weight.to(g.dtype), gradient, torch.zeros_like(Q)


for _key in ("CPU", "CUDA"):
    _library.impl("scaled_linear", _forward, _key)
    _library.impl("scaled_linear_backward", _backward, _key)


@torch.library.register_fake("fxgraft_kernels::scaled_linear", lib=_library)
def _(x, weight, bias, P, Q, low_rank):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("fxgraft_kernels::scaled_linear_backward", lib=_library)
def _(g, x, y0, weight, bias, P, Q, low_rank):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(P), torch.empty_like(Q)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, P, Q, low_rank = inputs
    ctx.save_for_backward(x, output[1], weight, bias, P, Q, low_rank)


def _gradients(ctx, g, _):  # type: ignore[no-untyped-def]
    dx, dP, dQ = torch.ops.fxgraft_kernels.scaled_linear_backward(g, *ctx.saved_tensors)
    return dx, None, None, dP, dQ, None


torch.library.register_autograd("fxgraft_kernels::scaled_linear", _gradients, setup_context=_save, lib=_library)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, P: Tensor, Q: Tensor, low_rank: Tensor) -> Tensor:
    """`x (W0 * (1 + P Q))^T + bias`.

    x `(..., in)`; weight `(out, in)` and bias `(out,)` or None, frozen; P `(out, r + 1)`, Q `(r + 1, in)`: the last
    column of P scales rows and the last row of Q is ones; low_rank: one number, zero where the other columns of P are
    -> `(..., out)` in x's dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    y, _ = torch.ops.fxgraft_kernels.scaled_linear(x.reshape(-1, x.shape[-1]), weight, bias, P, Q, low_rank)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
