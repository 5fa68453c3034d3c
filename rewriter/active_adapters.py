"""Which adapters of a model may be active at once, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .base_names import lookup
from .errors import AdapterError, listing
from .grafted_class import base_class
from .method import Method
from .sites import Site
from .state import ModelState
from .targeting.patterns import inside


def _linear_in_parameters(module: nn.Module) -> bool:
    """Whether halfway between two such modules is halfway between their outputs."""
    forward = base_class(module).forward
    return forward is nn.Linear.forward or (forward is nn.Embedding.forward and module.max_norm is None)


def chosen_weights(state: ModelState, names: Any, weights: Any, verb: str) -> dict[str, float]:
    """`names` (a list, or a dict with weights) and `weights` as one dict in order, checked."""
    if isinstance(names, str):
        raise AdapterError(f"{verb}(model, {names!r}): give a list of names, [{names!r}]")
    if isinstance(names, Mapping):
        if weights is not None:
            raise AdapterError(f"{verb}(model, {dict(names)!r}, weights=...): the dict has the weights already")
        names, weights = list(names), list(names.values())
    names = list(names)
    if unknown := [n for n in names if n not in state.adapters]:
        raise AdapterError(f"no adapter {listing(unknown)} in this model; it has {listing(state.adapters)}")
    if len(set(names)) != len(names):
        raise AdapterError(f"{verb}(model, {names}): each adapter at most once")
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise AdapterError(f"{verb}(weights={dict(weights)!r}): give one for each of {listing(names)}")
        weights = [weights[name] for name in names]
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise AdapterError(f"{verb}: {len(weights)} weights for {len(names)} adapters, {listing(names)}")
    return {name: check_weight(weight, name, verb) for name, weight in zip(names, weights, strict=True)}


def check_weight(weight: Any, name: str, verb: str) -> float:
    """The weight as a float; `AdapterError` unless it is a finite number other than 0."""
    number = not isinstance(weight, (bool, str)) and hasattr(weight, "__float__")
    value = float(weight) if number else math.nan
    if not math.isfinite(value) or value == 0:
        raise AdapterError(
            f"{verb}: the weight of {name!r} is {weight!r}; allowed are finite numbers other than 0 "
            "(an adapter that shall not count is left out)"
        )
    return value


def check_together(root: nn.Module, state: ModelState, weights: Mapping[str, float]) -> None:
    """Raise `AdapterError` where adapters exclude each other, or a weight has no exact meaning."""
    trained_by: dict[str, str] = {}
    for name, weight in weights.items():
        record = state.adapters[name]
        paths = (*record.train, *dict.fromkeys(tied.path for tied in record.ties), *record.parameters)
        for path in paths:
            for other, owner in trained_by.items():
                if _inside(path, other) or _inside(other, path):
                    raise AdapterError(
                        f"adapters {owner!r} and {name!r} both bring their own trained {path!r}: only one of them can "
                        "be active"
                    )
        for path in record.train if weight != 1 else ():
            if record.ties or not _linear_in_parameters(lookup(root, path)):
                raise AdapterError(
                    f"adapter {name!r} trains {path!r} in full, which is no single, untied linear or embedding: a "
                    f"weight of {weight} between it and the base's has no exact meaning. Give it the weight 1"
                )
        if weight != 1 and record.parameters:
            raise AdapterError(
                f"adapter {name!r} trains {listing(record.parameters)} in full: a weight of {weight} between these and "
                "the base's has no exact meaning. Give it the weight 1"
            )
        trained_by |= dict.fromkeys(paths, name)
    follows = {(t.path, t.attribute): (n, t.trained) for n in weights for t in state.adapters[n].ties}
    for name in weights:
        for site, method in ((s, group.method) for group in state.adapters[name].groups for s in group.sites):
            if (site.owner, site.weight) in follows:
                other, path = follows[site.owner, site.weight]
                raise AdapterError(
                    f"adapter {name!r} is on {site.name!r}, which is tied to {path!r} that {other!r} trains in full: "
                    "only one of them can be active"
                )
            for other in weights:
                if parameters := state.adapters[other].parameters:
                    _check_parameters(name, site, method, other, parameters)
                for path in state.adapters[other].train if other != name else ():
                    if _inside(site.owner, path):
                        raise AdapterError(
                            f"adapter {other!r} brings its own trained {path!r}, and adapter {name!r} adapts "
                            f"{site.name!r} of the base's: only one of them can be active"
                        )


def _check_parameters(name: str, site: Site, method: Method, other: str, parameters: Collection[str]) -> None:
    """Raise where another adapter trains the weight under a site, or a bias that the site's method changes."""
    for tensor in (site.weight, site.bias if method.adds_bias(site) else None):
        full = f"{site.owner}.{tensor}".lstrip(".")
        if tensor is not None and full in parameters:
            raise AdapterError(
                f"adapter {other!r} trains {full!r} in full, and adapter {name!r} changes the base's: only one of them "
                "can be active"
            )


def _inside(path: str, module: str) -> bool:
    return not module or inside(path, (module,))
