"""Patterns -> sites. A pattern that matches nothing, or something that cannot be adapted, is an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .base_names import base_modules
from .errors import AdapterError, TargetError, listing
from .grafted_class import base_class
from .method import Method
from .modules.offloaded import device_of
from .modules.scripted import is_linear
from .quantised.quantised import Stored, quantised
from .sites import NoMatch, Site
from .spec import ALL_LINEAR, Spec, Target
from .state import Tie, find_state
from .targeting.fused_parts import Choice, names_of_parts, parts_called, whole_or_parts
from .targeting.left_out import left_out_of
from .targeting.no_products import computed_weight, refused_weights, why_none
from .targeting.output_heads import called_head, heads_with_reasons
from .targeting.patterns import inside, is_name, matches, names_only, no_match
from .targeting.routers import routers
from .targeting.train_targets import check_parameters, check_ties, ties_of, to_train, with_ties
from .targeting.weight_products import Candidate, Graphs, candidates_of, product_with, sites_of


@dataclass(frozen=True)
class Resolution:
    """The sites of a spec in model order, each with its method, and the modules and parameters to train in full.

    `left` is what `all-linear` left out, and why.
    """

    sites: tuple[tuple[Site, Method], ...]
    train: tuple[str, ...]
    ties: tuple[Tie, ...] = ()
    parameters: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()


def _select(
    spec: Spec,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, Candidate],
    heads: Collection[str],
    routed: Collection[str],
    train: tuple[str, ...],
    known: Collection[str],
) -> dict[str, Choice]:
    """Candidate name -> what of it was asked for."""
    chosen: dict[str, Choice] = {}
    for given in spec.targets:
        target = given if isinstance(given, Target) else None
        pattern = target.pattern if target else str(given)
        if pattern == ALL_LINEAR:
            here = [n for n, c in candidates.items() if c.linear]
            hits = [n for n in here if not inside(candidates[n].owner, (*heads, *routed, *train))]
            if known:  # saved while heads were told by their names alone
                hits = [n for n in here if n in known or (n in hits and not called_head(candidates[n].owner))]
        else:
            hits = _hits(pattern, candidates, known)
            others = [n for n in modules if n and matches(n, pattern) and n not in candidates]
            by_ending = is_name(pattern) and hits != [pattern]
            if not hits or by_ending:
                _refuse_kinds(pattern, modules)
            if others and (not hits or by_ending):
                kinds = ", ".join(f"{n!r} is a {base_class(modules[n]).__name__}" for n in others[:4])
                inner = [n for n in candidates if n.startswith(others[0] + ".")]
                hint = f"; inside it are {listing(inner, 4)}" if inner else ""
                raise TargetError(
                    f"target {pattern!r} matches {len(others)} module(s) without a linear weight of their own: "
                    f"{kinds}{hint}. Name linear layers, or exclude these"
                )
        if hits:
            found = {name: whole_or_parts(modules, candidates[name], target) for name in hits}
        elif loose := [n for n, c in candidates.items() if c.loose and matches(n, pattern)]:
            raise TargetError(
                f"target {pattern!r} matches {listing(loose, 4)} alone, which may hold anything and are taken by their "
                "names only: name the ones that you mean"
            )
        elif not (found := {} if target else parts_called(pattern, modules, candidates)):
            raise no_match("target", pattern, [*candidates, *names_of_parts(modules, candidates)])
        for name, choice in found.items():
            choice = replace(choice, asked=pattern != ALL_LINEAR)
            joined = chosen[name].joined(choice) if name in chosen else choice
            if joined is None:
                raise TargetError(f"{name!r} is matched by two targets with different parts: {spec.targets}")
            chosen[name] = joined
    for pattern in spec.exclude:
        # names of modules count too, so that excluding a block excludes what is inside
        blocks = [n for n in modules if n and matches(n, pattern)]
        gone = [n for n, c in candidates.items() if matches(n, pattern) or inside(c.owner, blocks)]
        if not gone and not (parts := parts_called(pattern, modules, candidates)):
            raise no_match("exclude", pattern, candidates)
        for name in gone:
            chosen.pop(name, None)
        for name, part in {} if gone else parts.items():
            if name in chosen and (left := chosen.pop(name).without(part, pattern, name)) is not None:
                chosen[name] = left
    if not chosen:
        raise TargetError(f"targets {list(spec.targets)} are all taken out again by exclude {list(spec.exclude)}")
    return chosen


def _refuse_kinds(pattern: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise where a pattern names a module without products, or a weight of one."""
    for name, module in modules.items():
        if name and matches(name, pattern) and (why := computed_weight(module)) is not None:
            raise TargetError(f"target {pattern!r}: {name!r} cannot be adapted: {why}. Or exclude it")
    for name, module in refused_weights(modules):
        if matches(name, pattern):
            raise TargetError(
                f"target {pattern!r}: {name!r} is a {base_class(module).__name__} and cannot be adapted: "
                f"{why_none(module)}"
            )


def _hits(pattern: str, candidates: Mapping[str, Candidate], known: Collection[str]) -> list[str]:
    """The candidates a pattern means: the one of exactly this name before all whose names end with it.

    Adapters that were saved before that was so have both: what is `known` of one says so.
    """
    alone = names_only(pattern)
    hits = [name for name, c in candidates.items() if (alone or not c.loose) and matches(name, pattern)]
    others = [name for name in hits if name != pattern]
    if is_name(pattern) and pattern in hits and not any(name in known for name in others):
        return [pattern]
    return hits


def resolve(model: nn.Module, spec: Spec, known: Collection[str] = (), fit: bool = False) -> Resolution:
    """Find every site of a spec. Reads the model and changes nothing.

    Args:
        known: names of the sites, where the spec is that of an adapter which exists already.
        fit: whether methods take less at sites that are too small for them.

    Raises:
        TargetError: a pattern matches nothing (near misses are listed) or something that cannot be adapted.
    """
    modules = dict(base_modules(model))
    candidates = candidates_of(modules)
    train, parameters = to_train(spec, modules)
    all_linear = any((t.pattern if isinstance(t, Target) else t) == ALL_LINEAR for t in spec.targets)
    heads = heads_with_reasons(model) if all_linear else {}  # telling them may trace the whole model
    routed = routers(modules, (c.owner for c in candidates.values())) if all_linear else set()
    chosen = _select(spec, modules, candidates, heads, routed, train, known)

    sites: list[tuple[Site, Method]] = []
    left_out: list[str] = []
    unfit: list[tuple[str, str]] = []
    used_overrides: set[str] = set()
    graphs: Graphs = {}
    for name, candidate in candidates.items():
        if name not in chosen:
            continue
        choice = chosen[name]
        if inside(candidate.owner, train):
            raise TargetError(f"{name!r} is both a target and inside a trained module ({list(train)}): choose one")
        linear = product_with(modules, candidate, graphs)
        if isinstance(linear, NoMatch):
            if choice.asked:
                raise TargetError(f"{name!r} cannot be adapted: {linear.reason}. Exclude it or choose other targets")
            unfit.append((name or "the root", linear.reason))
            if is_linear(modules[candidate.owner]) and computed_weight(modules[candidate.owner]) is None:
                left_out.append(f"{name or 'the root'} ({linear.reason})")
            continue
        if not choice.asked and not linear.product.linear:
            continue
        owner = modules[candidate.owner]
        kind = quantised(owner)
        weight: Any = owner._parameters[candidate.attribute] if kind is None else Stored.of(owner, kind)
        device = weight.device if kind is not None else device_of(owner, weight)
        cut, select = choice.settled(candidate, linear.product.matrix(weight).shape[-2], modules)
        for site in sites_of(candidate, linear, weight, cut, select, device):
            # a part of a fused weight answers to its own names, `qkv[0]` and `q_proj`, and to the weight's
            hits = [p for p in spec.overrides if any(matches(answer, p) for answer in site.answers)]
            used_overrides.update(hits)
            method = spec.overrides[hits[0]] if hits else spec.method
            sites.append((site, method.fitted(site.out_features, site.in_features) if fit else method))
    for pattern in spec.overrides:
        if pattern not in used_overrides:
            raise no_match("override", pattern, [answer for site, _ in sites for answer in site.answers])
    if all_linear:
        left_out += [
            f"{path} ({why})"
            for path, module in modules.items()
            if isinstance(module, nn.Linear)
            and (why := computed_weight(module)) is not None
            and not inside(path, train)
            and not any(matches(path, pattern) for pattern in spec.exclude)
        ]
    if left_out and sites:
        warnings.warn(f"{ALL_LINEAR!r} left out {len(left_out)} layer(s): {'; '.join(left_out[:4])}", stacklevel=3)
    if not sites:
        raise TargetError(
            f"{ALL_LINEAR!r} found no linear layer that can be adapted in this {type(model).__name__}"
            + (f": {'; '.join(left_out[:4])}" if left_out else "")
        )
    ties = ties_of(model, train, modules) if spec.keep_ties else ()
    check_ties((site for site, _ in sites), ties)
    parameters = with_ties(model, parameters, ties, spec.keep_ties)
    check_parameters(sites, parameters)
    left: tuple[tuple[str, str], ...] = ()
    if all_linear:
        taken = {c.owner for n, c in candidates.items() if n in chosen}
        left = left_out_of(modules, candidates, taken, heads, routed, train)
    return Resolution(tuple(sites), train, ties, parameters, (*left, *unfit))


def check_name(model: nn.Module, name: Any) -> None:
    """Raise `AdapterError` unless `name` can name a new adapter of this model."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"adapter name {name!r}: allowed are letters, digits, '_' and '-'")
    if hasattr(nn.Module, name) or name in ("shared", "method", "site"):
        raise AdapterError(f"adapter name {name!r} is taken by torch.nn.Module: choose another")
    state = find_state(model)
    if state is not None and name in state.adapters:
        raise AdapterError(
            f"this model already has an adapter {name!r}: choose another name, or fg.remove(model, {name!r}) first"
        )
