"""Sites whose parameter stacks a matrix per expert: a method sees as many sites, its tensors are stacked `(E, ...)`.

    W (E, out, in)      y = x W[e]^T      an adapter for every e: `A (E, r, in)`, `B (E, out, r)`

Methods know nothing of it. They are asked about E sites of one matrix each, and what they say is put together here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..method import Decl, Declaration, InitContext, Method, Tensors
from ..one_by_one import OneByOne
from ..sites import Site
from .stacked_experts import Experts


def matrices(site: Site) -> tuple[Site, ...]:
    """The sites of one matrix each: the site itself, or one for every expert, `<name>@<expert>`."""
    if not site.experts:
        return (site,)
    assert isinstance(site.product, Experts)
    return tuple(replace(site, name=f"{site.name}@{e}", product=site.product.one()) for e in range(site.experts))


def all_matrices(sites: Sequence[Site]) -> list[Site]:
    return [matrix for site in sites for matrix in matrices(site)]


def unstacked(site: Site, tensors: Tensors) -> list[Tensors]:
    """The tensors of a site as every matrix of it has them, as views."""
    if not site.experts:
        return [tensors]
    return [{name: tensor[e] for name, tensor in tensors.items()} for e in range(site.experts)]


def all_unstacked(sites: Sequence[Site], local: Sequence[Tensors]) -> list[Tensors]:
    return [one for site, tensors in zip(sites, local, strict=True) for one in unstacked(site, tensors)]


def each(site: Site, function: Callable[[Tensors], Any], local: Tensors) -> Any:
    """What a function of one matrix's tensors gives, stacked: tensors, tuples and dicts of tensors."""
    if not site.experts:
        return function(local)
    return _stack([function(one) for one in unstacked(site, local)])


def _stack(given: Sequence[Any]) -> Any:
    first = given[0]
    if isinstance(first, Tensor):
        return torch.stack(list(given))
    if isinstance(first, Mapping):
        return {name: _stack([one[name] for one in given]) for name in first}
    if isinstance(first, tuple):
        return tuple(_stack(values) for values in zip(*given, strict=True))
    return first


def declare(method: Method, sites: Sequence[Site]) -> Declaration:
    """`method.declare` for sites of any number of matrices. Raises `SpecError` where the method does not fit them."""
    if not any(site.experts for site in sites):
        return method.declare(sites)
    said = method.declare(all_matrices(sites))
    local: list[Mapping[str, Decl]] = []
    start = 0
    for site in sites:
        own = said.local[start : start + max(site.experts, 1)]
        start += len(own)
        if any(decls != own[0] for decls in own):
            raise SpecError(f"{type(method).__name__} gives the experts of {site.name!r} tensors of different shapes")
        stacked = {name: replace(d, shape=(site.experts, *d.shape)) for name, d in own[0].items()}
        local.append(stacked if site.experts else own[0])
    return Declaration(local, said.shared)


def derive(method: Method, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
    method.derive(all_matrices(sites), shared, all_unstacked(sites, local))


def initialise(
    method: Method,
    sites: Sequence[Site],
    shared: Tensors,
    local: Sequence[Tensors],
    weights: Sequence[Tensor],
    update: Any = None,
) -> None:
    """`method.initialise`; `weights` are those of the sites as they are stored, and the method sees `(out, in)`."""
    views: Sequence[Tensor]
    if any(site.experts for site in sites):
        views = [v for site, w in zip(sites, weights, strict=True) for v in _matrices(site, site.linear_layout(w))]
    else:
        views = OneByOne(len(sites), lambda i: sites[i].linear_layout(weights[i]))
    context = InitContext(views, update)
    method.initialise(all_matrices(sites), shared, all_unstacked(sites, local), context)


def _matrices(site: Site, view: Tensor) -> list[Tensor]:
    return list(view.unbind(0)) if site.experts else [view]


def fold(
    method: Method, site: Site, weight: Tensor, bias: Tensor | None, shared: Tensors, local: Tensors
) -> tuple[Tensor, Tensor | None]:
    """`method.fold` for `(out, in)`, or expert by expert for `(E, out, in)`, which has no bias of its own."""
    if not site.experts:
        return method.fold(weight, bias, shared, local)
    merged = [method.fold(weight[e], None, shared, own)[0] for e, own in enumerate(unstacked(site, local))]
    return torch.stack(merged), bias


def factors(method: Method, site: Site, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
    """`method.factors`: `A (r, in)` and `B (out, r)`, stacked for experts."""
    return each(site, lambda own: method.factors(shared, own), local)  # type: ignore[no-any-return]
