"""Grafting an adapter that another program wrote: the spec that names its sites one by one, filled with its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ...rewriter.analysis.dataflow import tied_names
from ...rewriter.base_names import base_modules, base_parameters
from ...rewriter.errors import CheckpointError, listing, near_misses
from ...rewriter.graft_plan import Plan
from ...rewriter.method import Method
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.spec import Spec
from ...rewriter.targeting.patterns import exactly, matches
from .foreign.foreign_folder import ForeignAdapter, in_model_order
from .graft_values import filled
from .stored_cuts import exact_targets, names_here, parts_elsewhere, renamed


def graft_foreign(model: M, foreign: ForeignAdapter, name: str, what: str) -> M:
    """Graft an adapter of another program; the input model is not changed.

    Raises:
        CheckpointError: the model has no such site, or the tensors are not what the methods need there.
    """
    if not foreign.methods:
        raise CheckpointError(f"{what} has no adapter tensors at all")
    names = names_here(model, foreign.methods, {})
    if by_order := [site for site in names if foreign.methods[site].by_order]:
        raise CheckpointError(
            f"{what} has adapters at {listing(by_order)}, which are parts of fused layers in this "
            f"{type(model).__name__}: its numbers go by the order of the layers where it was trained, which is not "
            "known here. Load it there, and save it with fg.save_adapter"
        )
    there = {names.get(site, site): site for site in foreign.methods}
    order = in_model_order(there, model)
    foreign = replace(foreign, methods={there[site]: foreign.methods[there[site]] for site in order})
    tensors = {renamed(key, names): tensor for key, tensor in foreign.tensors.items()} if names else foreign.tensors

    def fits(plan: Plan) -> None:
        hosted = [site.name for site in plan.sites if site.host is not None and site.name not in foreign.read_by_parent]
        if hosted:
            raise CheckpointError(
                f"{what} has adapters at {listing(hosted)}, whose weights this model reads without calling the layers: "
                "where it was trained they had no effect"
            )
        here = {site.name for site in plan.sites}
        if missing := [site for site in order if site not in here]:
            known = [*(n for n, _ in base_modules(unwrap(model))), *parts_elsewhere(model)]
            close = near_misses(missing[0], known, 2)
            raise CheckpointError(
                f"{what} was made for another model than this {type(model).__name__}, which has no linear layer "
                f"{listing(missing)}" + (f"; close are {listing(close)}" if close else "")
            )

    hint = "The adapter is of another model, or its config of another adapter"
    return filled(model, _spec_of(foreign, model, names), name, tensors, what, order=order, fits=fits, hint=hint)


def _spec_of(foreign: ForeignAdapter, model: nn.Module, names: Mapping[str, str]) -> Spec:
    """The spec that names each site exactly, whatever patterns the other program found them with."""
    ((common, _),) = Counter(foreign.methods.values()).most_common(1)
    others: dict[Method, list[str]] = {}
    for site, method in foreign.methods.items():
        if method != common:
            others.setdefault(method, []).append(site)
    known = [name for name, _ in base_modules(unwrap(model))] + [n for n, _ in base_parameters(unwrap(model))]
    return Spec(
        common,
        targets=exact_targets(foreign.methods, names),
        train=tuple(_plain(path, known) for path in foreign.train),
        keep_ties=_ties_hold(foreign, model),
        overrides={exactly(sites): method for method, sites in others.items()},
    )


def _ties_hold(foreign: ForeignAdapter, model: nn.Module) -> bool:
    """Whether what is tied in the model is tied in the adapter: PEFT trains a copy of each module of its own, and only
    their values say whether it kept the copies alike."""
    tied = tied_names(unwrap(model)) if foreign.train else {}
    pairs = [(key, other) for key in foreign.tensors for other in tied.get(key, ())]
    return all(
        other in foreign.tensors and torch.equal(foreign.tensors[key], foreign.tensors[other]) for key, other in pairs
    )


def _plain(name: str, known: Iterable[str]) -> str:
    """The name as a pattern, in plain form where that is as exact."""
    return name if [n for n in known if n and matches(n, name)] == [name] else exactly([name])
