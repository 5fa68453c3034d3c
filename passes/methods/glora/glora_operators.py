"""GLoRA's operators: a site on one path, and a site of the supernet, whose path is data (arXiv 2306.07967, section 3).

There is one full product per site. A row-wise A scales the rows of the base's product; B is a skinny product or a
broadcast; a low-rank A forms the effective weight once and its product takes the place of the base's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....rewriter.dialect import Traits, operator
from .effective_weight import EffectiveLinear, as_product
from .path import COLUMNS
from .supernet_product import scaled_linear


def shift_of(
    weight: Tensor, bias: Tensor | None, Cd: Tensor | None, Cu: Tensor | None, D: Tensor | None, E: Tensor | None
) -> Tensor | None:
    """`b0 * D + E + W0 C`, `(out,)` or `(1,)`; None where the path has none of them."""
    terms = []
    if Cd is not None:
        C = Cd if Cu is None else Cd @ Cu  # (in, 1) first: then one matrix-vector product
        terms.append((weight @ C.to(weight.dtype)).squeeze(-1))
    if bias is not None and D is not None:
        terms.append(bias * D)
    if E is not None:
        terms.append(E)
    return sum(terms[1:], terms[0]) if terms else None


def glora_weight(
    weight: Tensor, bias: Tensor | None, Ad: Tensor | None, Au: Tensor | None, Bd: Tensor | None, Bu: Tensor | None,
    Cd: Tensor | None, Cu: Tensor | None, D: Tensor | None, E: Tensor | None, keep: bool, biased: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The weight `(out, in)` and bias `(out,)` that `glora` multiplies x by, in the base's dtype."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    dtype, weight = weight.dtype, weight.to(wide)
    result = weight if keep else torch.zeros_like(weight)
    if Ad is not None:
        result = result + weight * (Ad if Au is None else Ad @ Au)
    if Bd is not None:
        result = result + (Bd if Bu is None else Bd @ Bu)
    shift = shift_of(weight, None if bias is None else bias.to(wide), Cd, Cu, D, E)
    if keep and biased and bias is not None:
        shift = bias.to(wide) if shift is None else bias + shift
    return result.to(dtype), None if shift is None else shift.expand(weight.shape[0]).to(dtype)


@operator(
    "glora(Tensor x, Tensor? y, Tensor weight, Tensor? bias, Tensor? Ad, Tensor? Au, Tensor? Bd, Tensor? Bu, "
    "Tensor? Cd, Tensor? Cu, Tensor? D, Tensor? E, bool keep, bool biased) -> Tensor",
    Traits(weight_form=glora_weight),
)
def glora(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, Ad: Tensor | None, Au: Tensor | None,
          Bd: Tensor | None, Bu: Tensor | None, Cd: Tensor | None, Cu: Tensor | None, D: Tensor | None,
          E: Tensor | None, keep: bool, biased: bool) -> Tensor:  # fmt: skip
    """`x (W0 * A + B)^T + b0 * D + E + W0 C`, and with `keep` the base `x W0^T (+ b0)` too, `(..., out)` in x's dtype.

    x `(..., in)`; weight `(out, in)`; bias `(out,)` or None; `biased`: the base product contains the bias. Of A and B
    `Xd (out, r)` with `Xu (r, in)`, or `Xd (out, 1) / (1, 1)` alone, or neither; Cd `(in, r)` with Cu `(r, 1)`, or
    `(in, 1)` alone; D, E `(out,)` or `(1,)`. y `(..., out)`, the base product, is read by a row-wise A only; without
    it that A is computed densely. The effective weight is rounded to x's dtype once, as merging rounds it.
    """
    out_features = weight.shape[0]
    shift = shift_of(weight, bias, Cd, Cu, D, E)
    if Ad is not None and (Au is not None or y is None):
        if keep and biased and bias is not None:
            shift = bias if shift is None else bias + shift
        B = (None, None) if Bd is None else as_product(Bd, Bu, weight)
        shift = None if shift is None else shift.to(x.dtype).expand(out_features)
        # Flat: a product of more dimensions is a view, and nobody may write into a view that a Function returns.
        flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 and torch.is_grad_enabled() else x
        y_new = EffectiveLinear.apply(flat, weight, shift, *as_product(Ad, Au, weight), *B, keep)
        return y_new if flat is x else y_new.view(*x.shape[:-1], out_features)  # type: ignore[no-any-return]
    rows = None if Ad is None else Ad.flatten().to(x.dtype)
    if rows is not None and biased and bias is not None:  # y holds b0, and A must not scale it
        shift = -bias * rows if shift is None else shift - bias * rows
    if shift is not None:
        shift = shift.to(x.dtype)
    delta = shift
    if Bd is not None and Bu is not None:
        z = F.linear(x, Bu.to(x.dtype))
        delta = F.linear(z, Bd.to(x.dtype), None if shift is None else shift.expand(out_features))
    elif Bd is not None:
        total, row = x.sum(-1, keepdim=True), Bd.flatten().to(x.dtype)
        delta = total * row if shift is None else torch.addcmul(shift, total, row)
    if rows is not None and y is not None:
        scaled = torch.addcmul(y, y, rows) if keep else y * rows
        return scaled if delta is None else scaled.add_(delta)  # fresh, and no backward reads it
    if delta is None:
        delta = x.new_zeros(1)
    return delta.expand(*x.shape[:-1], out_features)


@operator(
    "glora_supernet(Tensor x, Tensor weight, Tensor? bias, Tensor Ad, Tensor Au, Tensor Bd, Tensor Bu, Tensor Cd, "
    "Tensor Cu, Tensor? D, Tensor E, Tensor mask, bool keep, bool biased) -> Tensor"
)
def glora_supernet(x: Tensor, weight: Tensor, bias: Tensor | None, Ad: Tensor, Au: Tensor, Bd: Tensor, Bu: Tensor,
                   Cd: Tensor, Cu: Tensor, D: Tensor | None, E: Tensor, mask: Tensor, keep: bool, biased: bool
                   ) -> Tensor:  # fmt: skip
    """`glora` on the path that mask `(12,)` selects (zeros and ones, see `COLUMNS`), as in `glora` otherwise.

    The path is data, so it changes nothing in the graph; tensors off the path get a gradient of zero.
    """
    m = dict(zip(COLUMNS, mask.to(device=x.device, dtype=Ad.dtype).unbind(0), strict=True))

    def product(name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        row = down[:, :1] * m[name, "vector"] + down[:1, :1] * m[name, "constant"]
        return torch.cat([down * m[name, "lora"], row], 1), torch.cat([up, up.new_ones(1, up.shape[1])])

    def line(name: str, value: Tensor) -> Tensor:
        return value * m[name, "vector"] + value[:1] * m[name, "constant"]

    C = (Cd @ Cu) * m["C", "lora"] + Cd[:, :1] * m["C", "vector"]
    if keep and not weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting():
        shift = shift_of(weight, bias, C, None, None if D is None else line("D", D), line("E", E))
        down, up = product("B", Bd, Bu)
        rest = F.linear(F.linear(x, up.to(x.dtype)), down.to(x.dtype), None if shift is None else shift.to(x.dtype))
        within = bias if biased else None
        return scaled_linear(x, weight, within, *product("A", Ad, Au), m["A", "lora"]) + rest
    return glora(
        x, None, weight, bias, *product("A", Ad, Au), *product("B", Bd, Bu), C, None,
        None if D is None else line("D", D), line("E", E), keep, biased,
    )  # fmt: skip
