"""What a method computes beside the product with one expert's matrix, and beside those of many experts at once.

    one    y = x W[e]^T             ->  y + fxgraft::<method>(x, A[e], B[e], ...)
    many   y = x_i W[e_i]^T for all ->  y + (x_i down[e_i]^T) across[e_i]^T      down (E, q, in), across (E, out, q)

`one` is the method's operator as it is. `many` asks for the operator's halves, for every expert, and multiplies as the
base does: a row each (`bmm`), all experts side by side (`bmm`), or rows sorted by expert (`grouped_mm`). An operator
without an outer half (HydraLoRA routes every row by itself, GLoRA works on whole weights) is refused at rewrite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..dialect import cast, eager_form, is_chain, traits_of
from ..emitter import Emitter, add_delta
from ..errors import SpecError
from ..method import Method
from ..sites import Site
from .stacked_experts import Experts

_ALIGNED = 8  # elements: the grouped kernels want strides of 16 bytes, in any dtype of 2 bytes and up
_ROW_WISE = {F.dropout, torch.mul, torch.narrow, torch.ops.aten.add_.Tensor, add_delta}

#: how the rows of x find their experts: a way, and what it needs
Where = tuple[Any, ...]
ALL: Where = ("all",)


def product(x: Tensor, factor: Tensor, where: Where) -> Tensor:
    """x times the transposed factor of each row's expert; factor `(E, q, in)`.

    `("rows", ids (S,))`: x `(S, n, in)`. `("all",)`: x `(E, n, in)`. `("grouped", function, offsets)`: x `(S, in)`,
    sorted by expert.
    """
    factor = cast(factor, x)
    if where[0] == "grouped":
        return where[1](x, factor.transpose(-2, -1), where[2])  # type: ignore[no-any-return]
    if where[0] == "rows":
        factor = factor.index_select(0, where[1])
    return torch.bmm(x, factor.transpose(1, 2))


def times(x: Tensor, factor: Tensor, where: Where) -> Tensor:
    """`product` with a factor `(E, in, q)`."""
    factor = cast(factor, x)
    if where[0] == "grouped":
        size = factor.shape[2]
        factor = F.pad(factor, (0, -size % _ALIGNED, 0, -factor.shape[1] % _ALIGNED))
        x = F.pad(x, (0, factor.shape[1] - x.shape[1]))
        return where[1](x, factor, where[2]).narrow(1, 0, size)  # type: ignore[no-any-return]
    return torch.bmm(x, factor.index_select(0, where[1]) if where[0] == "rows" else factor)


def aligned(down: Tensor, where: Where) -> Tensor:
    """A half with its `q` rows padded to what a grouped kernel takes."""
    return F.pad(down, (0, 0, 0, -down.shape[1] % _ALIGNED)) if where[0] == "grouped" else down


def aligned_across(across: Tensor, where: Where) -> Tensor:
    """The other half, likewise: `q` is its last dimension."""
    return F.pad(across, (0, -across.shape[2] % _ALIGNED)) if where[0] == "grouped" else across


@functools.lru_cache(maxsize=256)
def over_experts(function: Callable[..., Tensor], stacked: tuple[bool, ...]) -> Callable[..., Tensor]:
    """A half for every expert at once: arguments that are stacked `(E, ...)`, or the same for all."""
    mapped = torch.vmap(function, in_dims=tuple(0 if own else None for own in stacked))

    def halves(*args: Any) -> Tensor:
        if not torch.compiler.is_exporting():
            return mapped(*args)
        # torch.export cannot follow vmap: expert by expert
        count = next(value.shape[0] for value, own in zip(args, stacked, strict=True) if own)
        return torch.stack(
            [function(*(v[e] if own else v for v, own in zip(args, stacked, strict=True))) for e in range(count)]
        )

    halves.__name__ = f"{function.__name__}_over_experts"
    return halves


class ExpertEmitter(Emitter):
    """An emitter whose graph is a function of tensors, beside one expert's product or beside those of many.

    Args:
        named: the inputs of the graph, by kind (`own`, `shared`, `weight`, `training`) and name.
        where: the input that says how rows find their experts; None beside one product.
    """

    def __init__(
        self, graph: fx.Graph, site: Site, x: fx.Node, y: fx.Node, method: str, weighted: bool,
        named: dict[tuple[str, str], fx.Node], where: fx.Node | None,
    ) -> None:  # fmt: skip
        super().__init__(graph, site, x, y, 0, method, weighted)
        self._named, self._where = named, where

    def tensor(self, name: str) -> fx.Node:
        return self._named["own", name]

    def shared(self, name: str) -> fx.Node:
        return self._named["shared", name]

    def training(self) -> fx.Node:
        return self._named["training", ""]

    def delta_weight(self) -> fx.Node:
        return self._named["weight", ""]

    def given(self, name: str) -> fx.Node:
        raise _refusal(self.site, "what a call brings for each sample cannot be followed to the rows of its experts")

    def weight(self) -> fx.Node:
        raise _refusal(self.site, "it works on whole weights, and an expert's is read where it is multiplied only")

    bias = weight  # type: ignore[assignment]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        halves = traits_of(target).halves
        if self._where is None or target in _ROW_WISE:
            return super().call(target, *args, **kwargs)
        if is_chain(target):
            x, *tensors = args
            for tensor in tensors:
                x = super().call(times, x, tensor, self._where)
            return x
        if halves is None or halves.across is None or halves.inputs != 1 or kwargs:
            name = getattr(target, "__name__", str(target))
            raise _refusal(self.site, f"its {name} is no product of two factors, which grouped experts need")
        x, *rest = args
        own = {node for (kind, _), node in self._named.items() if kind == "own"}
        stacked = tuple(isinstance(value, fx.Node) and value in own for value in rest)
        down, across = over_experts(halves.down, stacked), over_experts(halves.across, stacked)
        z = super().call(product, x, super().call(aligned, super().call(down, *rest), self._where), self._where)
        up = super().call(aligned_across, super().call(across, *rest), self._where)
        return super().call(product, z, up, self._where)


def _refusal(site: Site, why: str) -> SpecError:
    return SpecError(
        f"{site.name!r} holds the matrices of several experts, and this method cannot be put beside them: {why}. "
        "Choose a low-rank method there (LoRA, LoRA-XS, LoRA-SB, Uni-LoRA, PRoLoRA, VeRA) in overrides, or exclude it"
    )


@dataclass(frozen=True)
class Beside:
    """One adapter of one site as functions.

    Args:
        one: `(x, y, training, *tensors) -> y`, x and the tensors of one expert.
        many: `(x, y, where, training, *tensors) -> y`, tensors of all experts.
        names: kind and name of every tensor, in order.
    """

    one: Callable[..., Tensor]
    many: Callable[..., Tensor]
    names: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def beside(method: Method, site: Site, own: tuple[str, ...], shared: tuple[str, ...], weighted: bool) -> Beside:
    """The functions of a method at a site. Raises `SpecError` where it cannot be put beside experts."""
    names = [("own", name) for name in own] + [("shared", name) for name in shared]
    names += [("weight", "")] if weighted else []
    assert isinstance(site.product, Experts)
    single = replace(site, product=site.product.one())
    one, many = (_function(method, single, names, weighted, many) for many in (False, True))
    return Beside(one, many, tuple(names))


def _function(
    method: Method, site: Site, names: Sequence[tuple[str, str]], weighted: bool, many: bool
) -> Callable[..., Tensor]:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    where = graph.placeholder("where") if many else None
    named = {("training", ""): graph.placeholder("training")}
    named |= {key: graph.placeholder(f"{key[0]}_{key[1]}") for key in names}
    graph.output(method.emit(ExpertEmitter(graph, site, x, y, method.key, weighted, named, where)))
    graph.lint()
    code = eager_form(graph).python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return functools.partial(namespace["forward"], None)
