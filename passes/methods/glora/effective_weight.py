"""GLoRA's effective weight, `W0 * (keep + P Q) + R S`, and the product with it that keeps no tensor of its size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def product_like(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """`left @ right` in the memory layout of `like`: Conv1D stores its weight transposed."""
    if like.stride(0) == 1 and like.stride(1) != 1:
        return (right.t() @ left.t()).t()
    return left @ right


def effective(weight: Tensor, P: Tensor, Q: Tensor, R: Tensor | None, S: Tensor | None, keep: bool) -> Tensor:
    """`W0 * (keep + P Q) + R S` in the widest dtype of its inputs."""
    scale = product_like(P, Q, weight)
    result = torch.addcmul(weight, weight, scale) if keep else weight * scale
    return result if R is None or S is None else result + product_like(R, S, weight)


class EffectiveLinear(torch.autograd.Function):
    """`F.linear(x, W0 * (keep + P Q) + R S, bias)` that saves no tensor of the weight's size.

    Left to autograd, every site would hold a copy of its weight from the forward to the backward; recomputing it is
    elementwise work. x `(..., in)`, weight `(out, in)`, bias `(out,)` or None in x's dtype, P `(out, p)`, Q `(p, in)`,
    R `(out, q)`, S `(q, in)` (both or neither).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, P, Q, R, S, keep):  # type: ignore[no-untyped-def, override]
        return F.linear(x, effective(weight, P, Q, R, S, keep).to(x.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, bias, P, Q, R, S, keep = inputs
        ctx.save_for_backward(x, weight, P, Q, R, S)
        ctx.keep, ctx.bias_dtype = keep, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def, override]
        x, weight, P, Q, R, S = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_factors = ctx.needs_input_grad[:7]
        grads: list[Tensor | None] = [None] * 8
        if need_x:  # under autocast the gradient is narrower than x
            grads[0] = (g @ effective(weight, P, Q, R, S, ctx.keep).to(g.dtype)).to(x.dtype)
        rows = g.reshape(-1, g.shape[-1])
        if need_bias:
            grads[2] = rows.sum(0).to(ctx.bias_dtype)
        if need_weight or any(need_factors):
            dense = product_like(rows.t(), x.reshape(-1, x.shape[-1]).to(g.dtype), weight).to(P.dtype)
            scaled = dense * weight
            if need_weight:
                scale = product_like(P, Q, weight)
                grads[1] = (torch.addcmul(dense, dense, scale) if ctx.keep else dense * scale).to(weight.dtype)
            grads[3], grads[4] = (scaled @ Q.t()).to(P.dtype), (P.t() @ scaled).to(Q.dtype)
            if R is not None:
                grads[5], grads[6] = dense @ S.t(), R.t() @ dense
        return tuple(grads)


def as_product(down: Tensor, up: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A support tensor as a product of shape `(out, in)`: rows and constants are rank one."""
    return (down.expand(weight.shape[0], -1), down.new_ones(1, weight.shape[1])) if up is None else (down, up)
