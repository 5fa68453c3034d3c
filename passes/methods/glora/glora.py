"""GLoRA: five support tensors and a searched path (Chavan et al., arXiv 2306.07967, section 3).

`W = W0 + W0 * A + B`, `b = b0 + b0 * D + E + W0 C`, `y = x W^T + b`, the first product elementwise. A and B are
`Xd Xu`, one column `Xd[:, 0]`, one number `Xd[0, 0]` or nothing; C is `Cd Cu`, its first column or nothing; D and E
are a vector, its element 0 or nothing: 432 paths per site, all drawn from the same tensors (the supernet).

There is one full product per site. A row-wise A scales the rows of the base's product; B is a skinny product or a
broadcast; a low-rank A forms the effective weight once and its product takes the place of the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....rewriter.config_checks import check_positive_int, check_rank
from ....rewriter.dialect import Traits, operator
from ....rewriter.emitter import PROVENANCE, Emitter
from ....rewriter.errors import MergeError, SpecError
from ....rewriter.method import Decl, Declaration, InitContext, Method, Tensors
from ....rewriter.sites import Site
from .path import COLUMNS, PATHS, GLoRAPath, draw_mask, path_from_dict
from .supernet import scaled_linear

TENSORS = ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """`left @ right` in the memory layout of `like`: Conv1D stores its weight transposed."""
    if like.stride(0) == 1 and like.stride(1) != 1:
        return (right.t() @ left.t()).t()
    return left @ right


def _effective(weight: Tensor, P: Tensor, Q: Tensor, R: Tensor | None, S: Tensor | None, keep: bool) -> Tensor:
    """`W0 * (keep + P Q) + R S` in the widest dtype of its inputs."""
    scale = _product(P, Q, weight)
    result = torch.addcmul(weight, weight, scale) if keep else weight * scale
    return result if R is None or S is None else result + _product(R, S, weight)


class _EffectiveLinear(torch.autograd.Function):
    """`F.linear(x, W0 * (keep + P Q) + R S, bias)` that saves no tensor of the weight's size.

    Left to autograd, every site would hold a copy of its weight from the forward to the backward; recomputing it is
    elementwise work. x `(..., in)`, weight `(out, in)`, bias `(out,)` or None in x's dtype, P `(out, p)`, Q `(p, in)`,
    R `(out, q)`, S `(q, in)` (both or neither).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, P, Q, R, S, keep):  # type: ignore[no-untyped-def, override]
        return F.linear(x, _effective(weight, P, Q, R, S, keep).to(x.dtype), bias)

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
            grads[0] = (g @ _effective(weight, P, Q, R, S, ctx.keep).to(g.dtype)).to(x.dtype)
        rows = g.reshape(-1, g.shape[-1])
        if need_bias:
            grads[2] = rows.sum(0).to(ctx.bias_dtype)
        if need_weight or any(need_factors):
            dense = _product(rows.t(), x.reshape(-1, x.shape[-1]).to(g.dtype), weight).to(P.dtype)
            scaled = dense * weight
            if need_weight:
                scale = _product(P, Q, weight)
                grads[1] = (torch.addcmul(dense, dense, scale) if ctx.keep else dense * scale).to(weight.dtype)
            grads[3], grads[4] = (scaled @ Q.t()).to(P.dtype), (P.t() @ scaled).to(Q.dtype)
            if R is not None:
                grads[5], grads[6] = dense @ S.t(), R.t() @ dense
        return tuple(grads)


def _factors(down: Tensor, up: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A support tensor as a product of shape `(out, in)`: rows and constants are rank one."""
    return (down.expand(weight.shape[0], -1), down.new_ones(1, weight.shape[1])) if up is None else (down, up)


def _shift(
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
    shift = _shift(weight, None if bias is None else bias.to(wide), Cd, Cu, D, E)
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
    shift = _shift(weight, bias, Cd, Cu, D, E)
    if Ad is not None and (Au is not None or y is None):
        if keep and biased and bias is not None:
            shift = bias if shift is None else bias + shift
        B = (None, None) if Bd is None else _factors(Bd, Bu, weight)
        shift = None if shift is None else shift.to(x.dtype).expand(out_features)
        # Flat: a product of more dimensions is a view, and nobody may write into a view that a Function returns.
        flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 and torch.is_grad_enabled() else x
        y_new = _EffectiveLinear.apply(flat, weight, shift, *_factors(Ad, Au, weight), *B, keep)
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
        shift = _shift(weight, bias, C, None, None if D is None else line("D", D), line("E", E))
        down, up = product("B", Bd, Bu)
        rest = F.linear(F.linear(x, up.to(x.dtype)), down.to(x.dtype), None if shift is None else shift.to(x.dtype))
        within = bias if biased else None
        return scaled_linear(x, weight, within, *product("A", Ad, Au), m["A", "lora"]) + rest
    return glora(
        x, None, weight, bias, *product("A", Ad, Au), *product("B", Bd, Bu), C, None,
        None if D is None else line("D", D), line("E", E), keep, biased,
    )  # fmt: skip


def _untouched(e: Emitter, y: fx.Node) -> bool:
    """Whether y is still the base's product: no adapter before this one has added to this span of it."""
    base = y if e.site.whole else y.args[0]
    assert isinstance(base, fx.Node)
    start, end = e.site.offset, e.site.offset + e.site.out_features

    def written(user: fx.Node) -> bool:
        if user is y or user.target is not torch.narrow or PROVENANCE not in user.meta:
            return False
        offset, length = user.args[2], user.args[3]
        return bool(offset < end and start < offset + length)  # type: ignore[operator]

    return PROVENANCE not in base.meta and not any(map(written, base.users))


@dataclass(frozen=True)
class GLoRA(Method, key="glora"):
    """GLoRA (arXiv 2306.07967).

    Args:
        rank: `r` of A, B and C, of use up to `min(in, out)` of a site.
        path: what each support tensor is (a `GLoRAPath`, or its dict from JSON). None is the supernet: in training
            every site draws one of the 432 paths at every forward, in eval it takes the path `set_paths` gave it,
            at first the maximal one, all low-rank and vectors.

    Tensors per site: `Ad, Bd (out, r)`, `Au, Bu (r, in)`, `Cd (in, r)`, `Cu (r, 1)`, `D, E (out,)`, all trained; with a
    path only what it uses: `Xd (out, 1)`, C's `(in, 1)`, for `vector`, one number for `constant`. D is left out where
    the base has no bias. Xd, D and E start at zero, Xu xavier-uniform: a no-op on every path.
    Supernet, derived: `path (1,)` int64 per site and one `table (432, 12)` of choice masks.

    The supernet costs what a low-rank A costs at every forward, whatever is drawn: a full weight-gradient product.

    Raises:
        SpecError: a value outside its range, or a base weight that is not floating.
    """

    not_low_rank: ClassVar[str | None] = (
        "GLoRA rescales the base weight elementwise (W0 * A has any rank) and changes the bias; use merge instead"
    )

    rank: int = 4
    path: GLoRAPath | None = None

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank)
        if isinstance(self.path, Mapping):
            object.__setattr__(self, "path", path_from_dict(self.path))
        if self.path is not None and not isinstance(self.path, GLoRAPath):
            raise SpecError(f"GLoRA(path={self.path!r}): give a GLoRAPath, or None for the supernet")

    def meaning(self) -> dict[str, Any]:
        low_rank = self.path is None or "lora" in (self.path.A, self.path.B, self.path.C)
        return super().meaning() | ({} if low_rank else {"rank": None})

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        path = self.path or PATHS[0]
        return path.shapes(site.in_features, site.out_features, self.rank, site.bias is not None)

    def adds_bias(self, site: Site) -> str | None:
        biased = not {"Cd", "D", "E"}.isdisjoint(self._shapes(site))
        return "choose a path with C, D and E 'none' there, or another method" if biased else None

    def declare(self, sites: Sequence[Site]) -> Declaration:
        if self.path is None or "lora" in (self.path.A, self.path.B, self.path.C):
            check_rank(self, self.rank, sites)
        for site in sites:
            if not site.dtype.is_floating_point:
                raise SpecError(f"GLoRA multiplies the weight elementwise, and that of {site.name!r} is {site.dtype}: "
                                "dequantise the site or exclude it")  # fmt: skip
        local = [{name: Decl(shape) for name, shape in self._shapes(site).items()} for site in sites]
        if self.path is not None:
            return Declaration(local)
        set_path = {"path": Decl((1,), "derived", torch.int64)}
        table = {"table": Decl((len(PATHS), len(COLUMNS)), "derived")}
        return Declaration([tensors | set_path for tensors in local], table)

    def derive(self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
        if self.path is None:
            rows = [[float(getattr(path, tensor) == choice) for tensor, choice in COLUMNS] for path in PATHS]
            shared["table"].copy_(torch.tensor(rows))
            for tensors in local:
                tensors["path"].zero_()

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for tensors in local:
            for name in TENSORS:
                if name in tensors and name.endswith("u"):
                    torch.nn.init.xavier_uniform_(tensors[name])
                elif name in tensors:
                    tensors[name].zero_()

    def emit(self, e: Emitter) -> fx.Node:
        y = e.y
        shapes = self._shapes(e.site)
        if not shapes:  # a path of nothing leaves the site alone
            if e.site.whole:
                return y
            base = y.args[0]
            e.graph.erase_node(y)
            return base  # type: ignore[return-value]
        tensors = [e.tensor(name) if name in shapes else None for name in TENSORS]
        weight, bias = e.weight(), e.bias()
        biased = bias is not None and e.site.form != "matmul"  # `x @ W + b` adds its bias behind the product
        clean = _untouched(e, y)
        keep = clean and e.site.whole and "Ad" in shapes and not e.weighted
        if self.path is None:
            training = e.graph.get_attr("training")
            mask = e.call(draw_mask, e.shared("table"), e.tensor("path"), training)
            new = e.call(glora_supernet, e.x, weight, bias, *tensors, mask, keep, biased)
        else:
            product = None
            if clean and "Ad" in shapes and "Au" not in shapes:
                # a part is added to in place, which must not change what the backward of A reads
                product = y if e.site.whole else e.call(torch.clone, y)
            new = e.call(glora, e.x, product, weight, bias, *tensors, keep, biased)
        if not keep:
            return e.add(new)
        if new not in y.users:  # the base's product is dead: eager must not run it
            y.replace_all_uses_with(new)
            e.graph.erase_node(y)
        return new

    def fold(
        self, weight: Tensor, bias: Tensor | None, shared: Tensors, local: Tensors
    ) -> tuple[Tensor, Tensor | None]:
        if self.path is None:
            raise MergeError(
                "a GLoRA supernet has no one weight: every site still chooses among 432 paths. Fix them first, "
                "fix_paths(model, search_paths(...).paths), and merge the result"
            )
        tensors = [local[name].to(weight.dtype) if name in local else None for name in TENSORS]
        return glora_weight(weight, bias, *tensors, keep=True, biased=True)  # type: ignore[misc, arg-type]
