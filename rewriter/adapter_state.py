"""An adapter's tensors together with what they mean: the methods that turn them into deltas.

A `B` of LoRA with alpha 16 is another adapter under alpha 4, and a Uni-LoRA vector under another seed is noise, though
every name and shape fits. So a state remembers the methods it was taken from, and whoever takes it compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import AdapterError, listing
from .method import Method, method_from_dict
from .parts import cut_from
from .state import AdapterRecord


class SiteMethod(NamedTuple):
    """What decides a site's numbers beside its tensors: the method, the site's size, the group it counts in, and how
    its weight is cut into parts where their number does not say it (`Cut.plain`)."""

    method: Method
    out_features: int
    in_features: int
    group: int = 0
    cut: tuple[int, ...] = ()


def methods_of(record: AdapterRecord) -> dict[str, SiteMethod]:
    """Site name -> its method, in the order the sites count in."""
    return {
        site.name: SiteMethod(group.method, site.out_features, site.in_features, index, site.plain_cut)
        for index, group in enumerate(record.groups)
        for site in group.sites
    }


class AdapterState(dict[str, Tensor]):
    """The dict of tensors that `adapter_state` returns. `methods` says what they mean, site by site.

    Copies, deep copies, pickles and `torch.save` files keep it; `dict(state)` and comprehensions do not, and are
    then taken at their word: values of the structure they are given to.
    """

    methods: Mapping[str, SiteMethod]

    def __init__(self, tensors: Mapping[str, Tensor], methods: Mapping[str, SiteMethod]) -> None:
        super().__init__(tensors)
        self.methods = dict(methods)

    def copy(self) -> AdapterState:
        return AdapterState(self, self.methods)

    def __reduce__(self) -> Any:
        return _rebuild, (dict(self), methods_to_dict(self.methods))


def methods_to_dict(methods: Mapping[str, SiteMethod]) -> dict[str, list[Any]]:
    """A JSON-ready dict; `methods_from_dict` reads it back."""
    return {site: [m.method.to_dict(), *m[1:4], *([list(m.cut)] if m.cut else [])] for site, m in methods.items()}


def methods_from_dict(data: Mapping[str, Any]) -> dict[str, SiteMethod]:
    """The inverse of `methods_to_dict`. Raises `SpecError` on an unknown method or field."""
    return {
        site: SiteMethod(method_from_dict(method), *rest[:3], *map(tuple, rest[3:]))
        for site, (method, *rest) in data.items()
    }


def _rebuild(tensors: dict[str, Tensor], methods: dict[str, Any]) -> AdapterState:
    return AdapterState(tensors, methods_from_dict(methods))


# A pickle names a function by its module. This name is in files: it stays, wherever the module moves.
_rebuild.__module__ = "fxgraft.rewriter.adapterstate"
sys.modules[_rebuild.__module__] = sys.modules[__name__]
# torch.load(weights_only=True), its default, reads what it knows to be harmless.
torch.serialization.add_safe_globals([_rebuild])


def check_same_function(expected: Mapping[str, SiteMethod], state: Mapping[str, Any], what: str) -> None:
    """Raise `AdapterError` where the state's methods would compute something else than the expected ones.

    A plain dict has no methods: it passes. Names, shapes and dtypes of tensors are `check_state`'s matter.

    Args:
        expected: `methods_of(record)` of the adapter that shall take the state.
        state: an `AdapterState`, or a plain dict.
        what: subject of the error texts.
    """
    if not isinstance(state, AdapterState):
        return
    given = state.methods
    if missing := [site for site in expected if site not in given]:
        raise AdapterError(f"{what} is of an adapter without the site(s) {listing(missing)}, which this one has")
    if unknown := [site for site in given if site not in expected]:
        raise AdapterError(f"{what} is of an adapter with more sites: {listing(unknown)}")
    for site, here in expected.items():
        there = given[site]
        same = type(here.method) is type(there.method)
        if not same or here.method.meaning() != there.method.meaning():
            names = _differing(here.method, there.method) if same else "the method"
            raise AdapterError(
                f"{what} is of {there.method} at {site!r}, the model's adapter is {here.method}: {names} would make "
                "the same tensors another adapter. Rewrite the model with the state's method"
            )
        if here[1:3] != there[1:3]:
            raise AdapterError(
                f"{what} is of another model: {site!r} is {there.out_features} x {there.in_features} there (out x in), "
                f"{here.out_features} x {here.in_features} here"
            )
        if here.cut != there.cut:
            raise AdapterError(
                f"{what} is of other rows: the weight of {site!r} is cut into {_cut(there.cut)} there, and into "
                f"{_cut(here.cut)} here"
            )
    ordered = [site for site, m in expected.items() if m.method.by_order]
    if ordered != [s for s in given if s in set(ordered)] or any(expected[s].group != given[s].group for s in ordered):
        raise AdapterError(f"{what} is of an adapter whose sites come in another order, so its projection is another")
    here_most, there_most = _largest(expected), _largest(given)
    sized = (site for site, m in expected.items() if m.method.by_size)
    if other := [s for s in sized if here_most[expected[s].group] != there_most[given[s].group]]:
        raise AdapterError(
            f"{what} has other sites than this adapter under one config (overrides) with {listing(other)}, and the "
            "largest of them makes the projection: it is another"
        )


def _cut(plain: tuple[int, ...]) -> str:
    return str(cut_from(plain)) if plain else "equal parts in one stretch"


def _differing(here: Method, there: Method) -> str:
    ours, theirs = here.meaning(), there.meaning()
    return " and ".join(key for key in theirs if ours.get(key) != theirs[key]) or "a field"


def _largest(methods: Mapping[str, SiteMethod]) -> dict[int, tuple[int, int]]:
    """Group -> the largest `(out, in)` of its sites."""
    found: dict[int, tuple[int, int]] = {}
    for _, rows, columns, group, _ in methods.values():
        out_features, in_features = found.get(group, (0, 0))
        found[group] = max(rows, out_features), max(columns, in_features)
    return found
