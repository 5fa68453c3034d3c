"""What `all-linear` leaves out of a model, and why: `explain` says it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from .no_products import refused_weights, why_none
from .patterns import inside
from .weight_products import Candidate


def left_out_of(
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, Candidate],
    taken: Collection[str],
    heads: Mapping[str, str],
    routed: Collection[str],
    train: Collection[str],
) -> tuple[tuple[str, str], ...]:
    """`(name, reason)` of the linear weights whose owners are not among those that are taken."""
    found: dict[str, str] = {}
    for name, candidate in candidates.items():
        if not candidate.linear or candidate.owner in taken:
            continue
        head = next((root for root in heads if inside(candidate.owner, (root,))), None)
        if inside(candidate.owner, train):
            found[name] = "trained in full"
        elif head is not None:
            found[name] = heads[head]
        elif inside(candidate.owner, routed):
            found[name] = "a router of experts: an adapter there is asked for by name"
        else:
            found[name] = "excluded"
    for name, module in refused_weights(modules):
        if name in modules and not isinstance(module, nn.LayerNorm):
            found.setdefault(name, why_none(module) or "it has no linear product")
    return tuple(found.items())
